# %% [markdown]
# # The family tree
#
# Ten kinds of Qwen from four years, each built here from its file at a size that runs in a moment. What one adds, removes and
# changes is not told but *looked up*: in the modules it is made of, the shapes of its parameters, the operations that a pass
# calls, and the source of its classes. All pictures are drawn from that, and so in the end is the tree.
#
# For the step from Qwen2 to Qwen3 in depth, see [what changed between generations](05_what_changed_between_generations.ipynb).

# %%
import dataclasses
import difflib
import inspect
import re
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import nn

import qwen_ref as qr
from qwen_ref import backend, plot
from qwen_ref.models import FILES as MODEL_TYPES
from qwen_ref.models import qwen1, qwen2, qwen3, qwen3_5, qwen3_next, qwen4_exp

MODEL = "tiny"  # to be placed in the tree at the end

torch.manual_seed(0)
torch.set_grad_enabled(False)
STYLE = plot.THEMES["light"]


@dataclasses.dataclass
class Kin:
    year: int
    file: object  # the module of the generation
    config: dict  # TINY: sizes all different, so that a swapped axis cannot hide
    parents: tuple = ()  # the first is what it is compared with


FAMILY = {
    "Qwen 1": Kin(2023, qwen1, qwen1.TINY),
    "Qwen2": Kin(2024, qwen2, qwen2.TINY, ("Qwen 1",)),
    "Qwen2 MoE": Kin(2024, qwen2, qwen2.TINY_MOE, ("Qwen2",)),
    "Qwen2.5-1M": Kin(2025, qwen2, qwen2.TINY_1M, ("Qwen2",)),
    "Qwen3": Kin(2025, qwen3, qwen3.TINY, ("Qwen2",)),
    "Qwen3 MoE": Kin(2025, qwen3, qwen3.TINY_MOE, ("Qwen3", "Qwen2 MoE")),
    "Qwen3-Next": Kin(2025, qwen3_next, qwen3_next.TINY, ("Qwen3 MoE",)),
    "Qwen3.5": Kin(2026, qwen3_5, qwen3_5.TINY, ("Qwen3-Next",)),
    "Qwen3.5 MoE": Kin(2026, qwen3_5, qwen3_5.TINY_MOE, ("Qwen3.5", "Qwen3-Next")),
    "Qwen4-Exp": Kin(2026, qwen4_exp, qwen4_exp.TINY, ("Qwen3.5 MoE",)),
}
implemented = {name for name in MODEL_TYPES if f"{name}_text" not in MODEL_TYPES}  # a multimodal name stands for its text model
assert implemented <= {kin.config["model_type"] for kin in FAMILY.values()}


def build(kin):
    model = kin.file.Model(kin.file.Config.from_json(kin.config)).eval()
    for p in model.parameters():
        p.normal_(std=0.1)
    return model


models = {name: build(kin) for name, kin in FAMILY.items()}
for name, model in models.items():
    print(f"{name:12} {FAMILY[name].file.__name__.rpartition('.')[2]:11} {model.num_parameters():8,} parameters")

# %% [markdown]
# ## What a pass calls
#
# Every formula is an operation with a name, and `backend.intercept` lets us stand beside it and watch. So each model reads 40
# tokens, and we note which operations run, how often, and what they are given.


# %%
@dataclasses.dataclass
class Look:
    calls: Counter  # operation -> how often
    first: dict  # operation -> (arguments, result) of its first call
    stream: torch.Size | None = None  # the shape of what the first layer is given


def look(model, tokens=40):
    seen = Look(Counter(), {})

    def watch(name):
        def wrapper(run, *args, **kwargs):
            result = run(*args, **kwargs)
            seen.calls[name] += 1
            seen.first.setdefault(name, (args, result))
            return result

        return wrapper

    def enter(layer, args):
        seen.stream = args[0].shape

    with ExitStack() as stack:
        for name in backend.OPERATIONS:
            stack.enter_context(backend.intercept(name, watch(name)))
        stack.callback(model.model.layers[0].register_forward_pre_hook(enter).remove)
        model(torch.arange(tokens)[None] * 7 % model.config.vocab_size)
    return seen


looks = {name: look(model) for name, model in models.items()}
operations = [op for op in backend.OPERATIONS if any(seen.calls[op] for seen in looks.values())]


def cells(axes, rows, columns, text, color, size=7):
    """A table as a picture: text and colour of every cell, by row and column."""
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            face = color(row, column)
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5))
            ink = "white" if face in STYLE.sequential[-2:] else STYLE.muted if face == STYLE.faint else STYLE.ink
            axes.text(x + 0.5, y + 0.5, text(row, column), ha="center", va="center", fontsize=size, color=ink)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    places = [x + 0.5 for x in range(len(columns))]
    axes.set_xticks(places, columns, fontsize=size, rotation=30, ha="left", rotation_mode="anchor")
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows, fontsize=size)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
cells(axes, operations, list(FAMILY), lambda op, name: looks[name].calls[op] or "",
      lambda op, name: STYLE.sequential[1] if looks[name].calls[op] else STYLE.faint)  # fmt: skip
plt.show()

# %% [markdown]
# Read it from left to right: `attention` leaves most layers and then all of them, `rms_norm` gives way to the norm that stores
# its distance from one, `gated_delta_rule` comes, and in the last column what carries the residual is an operation of its own.

# %%
assert all(looks[name].calls["attention"] for name in ("Qwen 1", "Qwen2", "Qwen3", "Qwen3-Next", "Qwen3.5"))
assert not looks["Qwen4-Exp"].calls["attention"] and looks["Qwen4-Exp"].calls["sparse_block_attention"]
assert not any(looks[name].calls["rms_norm"] for name in ("Qwen3-Next", "Qwen3.5", "Qwen3.5 MoE", "Qwen4-Exp"))
assert [name for name in FAMILY if looks[name].calls["stream_write"]] == ["Qwen4-Exp"]

# %% [markdown]
# ## Traits
#
# A trait is a question that the built model answers: has its attention a `q_norm`? Is the first rotation handed fewer angles
# than a head has numbers? Do the weights that its router returns sum to one?

# %%
ATTENTIONS = ("attention", "dual_chunk_attention", "sparse_block_attention")


def attention_of(model):
    return next(m for m in model.modules() if type(m).__name__.endswith("Attention"))


def has(model, kind):
    return any(type(m).__name__ == kind for m in model.modules())


def yes(answer):
    return "yes" if answer else "no"


def projections(model, seen):
    linears = {name: m for name, m in attention_of(model).named_children() if isinstance(m, nn.Linear)}
    ins = [m for name, m in linears.items() if name not in ("o_proj", "c_proj")]
    return f"{len(ins)}, biased" if ins[0].bias is not None else f"{len(ins)}"


def share_keys(model, seen):
    q, k = next(seen.first[op][0][:2] for op in ATTENTIONS if op in seen.first)
    return yes(q.shape[1] > k.shape[1])


def rotates(model, seen):
    (x, cos, _), _ = seen.first["rope"]
    return "whole heads" if cos.shape[-1] == x.shape[-1] else "a part"


def output_gate(model, seen):
    a = attention_of(model)
    return yes(hasattr(a, "o_proj") and a.q_proj.out_features == 2 * a.o_proj.in_features)


def stretches(model, seen):
    """`Rotary` takes YaRN's frequencies if a config asks for them; `NtkRotary` fits its own to the prompt."""
    if seen.calls["dual_chunk_attention"]:
        return "dual chunks"
    return {"Rotary": "YaRN", "NtkRotary": "NTK, logn"}[type(model.model.rotary_emb).__name__]


def delta_net(model, seen):
    nets = [m for m in model.modules() if type(m).__name__ == "GatedDeltaNet"]
    return "no" if not nets else "joint rows" if hasattr(nets[0], "in_proj_qkvz") else "plain rows"


def router(model, seen):
    if "router_topk" not in seen.first:
        return "none"
    weights, _ = seen.first["router_topk"][1]
    return "sum to 1" if torch.allclose(weights.sum(-1), torch.ones(len(weights))) else "sum below 1"


def draft(model, seen):
    if model.make_mtp() is not None:
        return "yes"
    return "not read" if any(re.search(pattern, "mtp.fc.weight") for pattern in model.ignored) else "no"


TRAITS = {
    "q, k, v projections": projections,
    "heads share keys": share_keys,
    "q and k normed": lambda model, seen: yes(hasattr(attention_of(model), "q_norm")),
    "rotates": rotates,
    "longer than trained": stretches,
    "attention reads": lambda model, seen: "chosen blocks" if seen.calls["sparse_block_attention"] else "all keys",
    "output gate": output_gate,
    "delta nets": delta_net,
    "norm multiplies by": lambda model, seen: "1 + w" if seen.calls["zero_centred_rms_norm"] else "w",
    "feed-forward": lambda model, seen: "experts" if seen.calls["moe_experts"] else "dense",
    "shared expert": lambda model, seen: yes(any(hasattr(m, "shared_expert") for m in model.modules())),
    "router's weights": router,
    "residual streams": lambda model, seen: "several" if len(seen.stream) == 4 else "one",
    "n-gram table": lambda model, seen: yes(has(model, "NGramEmbedding")),
    "draft layer": draft,
}


def traits_of(model, seen):
    return {trait: ask(model, seen) for trait, ask in TRAITS.items()}


traits = {name: traits_of(model, looks[name]) for name, model in models.items()}


def changes(name):
    """Trait -> new value, of what differs from the first parent."""
    parent = traits[FAMILY[name].parents[0]] if FAMILY[name].parents else {}
    return {trait: value for trait, value in traits[name].items() if value != parent.get(trait, value)}


def shade(trait, name):
    if trait in changes(name):
        return STYLE.sequential[2]
    return STYLE.faint if traits[name][trait] in ("no", "none") else STYLE.sequential[1]


figure, axes = plt.subplots(figsize=(9.5, 4.6), layout="constrained")
cells(axes, list(TRAITS), list(FAMILY), lambda trait, name: traits[name][trait], shade)
plt.show()

# %% [markdown]
# Dark cells are what a model changed from the one it is compared with: Qwen2.5-1M and Qwen3 with Qwen2, a mixture of experts
# with the dense model of its generation, Qwen3-Next with Qwen3 MoE, and so on down the tree. The largest step is the one from
# Qwen3 MoE to Qwen3-Next; Qwen3.5 MoE then differs from it in a single trait, and Qwen4-Exp begins anew. Some things come
# back: the shared expert that Qwen3 dropped returned in Qwen3-Next.
#
# ("Not read", of Qwen4-Exp: its files hold a draft layer, but no published code shows its structure.)

# %%
counts = {name: len(changes(name)) for name in FAMILY}
print("traits changed:", counts)
assert sorted(counts, key=counts.get)[-1] == "Qwen3-Next"
assert [traits[name]["shared expert"] for name in ("Qwen2 MoE", "Qwen3 MoE", "Qwen3-Next")] == ["yes", "no", "yes"]
assert changes("Qwen3") == {"q, k, v projections": "3", "q and k normed": "yes"}
assert [trait for trait in TRAITS if traits["Qwen3.5 MoE"][trait] != traits["Qwen3-Next"][trait]] == ["delta nets"]
assert changes("Qwen4-Exp") == {
    "attention reads": "chosen blocks", "residual streams": "several", "n-gram table": "yes", "draft layer": "not read",
}  # fmt: skip
assert changes("Qwen3-Next") == {
    "rotates": "a part", "output gate": "yes", "delta nets": "joint rows", "norm multiplies by": "1 + w",
    "shared expert": "yes", "draft layer": "yes",
}  # fmt: skip
assert changes("Qwen2 MoE")["router's weights"] == "sum below 1" and changes("Qwen3 MoE")["router's weights"] == "sum to 1"

# %% [markdown]
# ## Names in the file
#
# The same difference as a checkpoint shows it: parameter names, layer numbers left out, that the parent does not have (+) or
# that are gone (-).


# %%
def parameter_names(model):
    return {re.sub(r"^model\.(layers\.\d+\.)?", "", name).removesuffix(".weight") for name, _ in model.named_parameters()}


for name, kin in FAMILY.items():
    if kin.parents and kin.file is not FAMILY[kin.parents[0]].file:
        ours, theirs = parameter_names(models[name]), parameter_names(models[kin.parents[0]])
        print(f"{name}, from {kin.parents[0]}: {len(ours & theirs)} names stay")
        for sign, new in (("+", ours - theirs), ("-", theirs - ours)):
            if new:
                print(f"  {sign} {len(new):2}:", ", ".join(sorted(new)[:5]) + (", ..." if len(new) > 5 else ""))

# %% [markdown]
# Qwen 1 has names of its own throughout. This package gives its outer modules the later names, and keeps the inner ones.
#
# ## The source, class by class
#
# Each generation is one file, and no file imports another, so the same class stands in several of them. A cell shows how many
# lines came (+) and went (−) from one file to the next, and is the darker, the larger their share.

# %%
FILES = [qwen1, qwen2, qwen3, qwen3_next, qwen3_5, qwen4_exp]
CLASSES = ["Config", "Attention", "GatedDeltaNet", "SparseMoE", "Block", "Decoder", "Model"]


def short(file):
    return file.__name__.rpartition(".")[2]


def difference(older, newer, name):
    """(lines added, removed, of the newer class), or None if one of the two files has no such class."""
    if not (hasattr(older, name) and hasattr(newer, name)):
        return None
    before, after = (inspect.getsource(getattr(file, name)).splitlines() for file in (older, newer))
    signs = Counter(line[0] for line in difflib.ndiff(before, after))
    return signs["+"], signs["-"], len(after)


steps = {f"{short(a)} -> {short(b)}": (a, b) for a, b in pairwise(FILES)}
diffs = {(name, step): difference(*steps[step], name) for name in CLASSES for step in steps}


def told(name, step):
    if (found := diffs[name, step]) is not None:
        return "same" if found[:2] == (0, 0) else f"+{found[0]} −{found[1]}"
    older, newer = steps[step]
    return "new" if hasattr(newer, name) else "gone" if hasattr(older, name) else ""


def weight(name, step):
    if (found := diffs[name, step]) is None:
        return STYLE.sequential[3] if told(name, step) == "new" else STYLE.faint
    share = max(found[:2]) / found[2]
    return STYLE.sequential[1 if share < 0.2 else 2 if share < 0.6 else 3]


figure, axes = plt.subplots(figsize=(8, 2.9), layout="constrained")
cells(axes, CLASSES, list(steps), told, weight)
plt.show()
assert diffs["Attention", "qwen3_next -> qwen3_5"][:2] == (0, 0)  # the same text

# %% [markdown]
# The step from Qwen3-Next to Qwen3.5 leaves attention as it was. In the delta net two projections became four, whose rows need
# no sorting; what follows them is the same text:

# %%
for method in ("__init__", "project", "forward"):
    before, after = (inspect.getsource(getattr(file.GatedDeltaNet, method)).splitlines() for file in (qwen3_next, qwen3_5))
    for line in difflib.unified_diff(before, after, f"qwen3_next {method}", f"qwen3_5 {method}", n=0, lineterm=""):
        print(line)
assert before == after  # forward

# %% [markdown]
# ## Layer by layer, at official size
#
# Now ten official models, built on the `meta` device, which holds shapes and no numbers. What a layer is made of, one square
# per layer from first to last: its mixer above, its feed-forward below. (`n` marks the layer with the n-gram table.)

# %%
HYBRID = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "head_dim": 256,
          "partial_rotary_factor": 0.25, "full_attention_interval": 4}  # fmt: skip
OFFICIAL = {
    "Qwen-7B": ("Qwen 1", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 22016,
        "vocab_size": 151936, "seq_length": 8192}),
    "Qwen2.5-7B": ("Qwen2", {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064}),
    "Qwen1.5-MoE-A2.7B": ("Qwen2 MoE", {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 151936, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632}),
    "Qwen2.5-7B-1M": ("Qwen2.5-1M", {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "dual_chunk_attention_config": {
            "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}}),
    "Qwen3-8B": ("Qwen3", {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 12288, "vocab_size": 151936}),
    "Qwen3-30B-A3B": ("Qwen3 MoE", {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
    "Qwen3-Next-80B-A3B": ("Qwen3-Next", {
        **HYBRID, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
        "linear_num_value_heads": 32, "vocab_size": 151936, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}),
    "Qwen3.5-27B": ("Qwen3.5", {
        **HYBRID, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 24, "num_key_value_heads": 4,
        "linear_num_value_heads": 48, "intermediate_size": 17408, "vocab_size": 248320}),
    "Qwen3.5-35B-A3B": ("Qwen3.5 MoE", {
        **HYBRID, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
        "linear_num_value_heads": 32, "vocab_size": 248320, "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}),
    "Qwen4-Exp": ("Qwen4-Exp", {  # as the tests of its published code have it
        **HYBRID, "hidden_size": 2560, "num_hidden_layers": 48, "num_attention_heads": 24, "num_key_value_heads": 2,
        "linear_num_value_heads": 48, "vocab_size": 248320, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 640, "shared_expert_intermediate_size": 640, "output_gate_type": "sigmoid",
        "eos_token_id": 248044, "hc_count": 4, "hc_lowrank": 320, "ple_layer_ids": [2], "ple_embed_dim": 2560, "ngram_size": 3,
        "heads_per_ngram": 8, "ngram_vocab_size_base": 20_000_000, "split_ngram_parts": 128, "indexer_n_heads": 4,
        "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4}),
}  # fmt: skip


def build_official(kin, sizes):
    with torch.device("meta"):
        return kin.file.Model(kin.file.Config.from_json({"model_type": kin.config["model_type"], **sizes}))


large = {name: build_official(FAMILY[kin], sizes) for name, (kin, sizes) in OFFICIAL.items()}


def mixer(block):
    if hasattr(block, "linear_attn"):
        return "delta net"
    attention = block.self_attn if hasattr(block, "self_attn") else block.attn
    return ("attention to chosen blocks" if hasattr(attention, "indexer") else
            "attention in dual chunks" if type(attention).__name__ == "DualChunkAttention" else "attention")  # fmt: skip


def feed_forward(block):
    return "dense" if not hasattr(block.mlp, "experts") else (
        "experts + shared" if hasattr(block.mlp, "shared_expert") else "experts")  # fmt: skip


MIXERS = ("attention", "attention in dual chunks", "delta net", "attention to chosen blocks")
COLORS = dict(zip(MIXERS, STYLE.lines, strict=False))
COLORS |= {"dense": "#d7dbe2", "experts": "#aab2bf", "experts + shared": "#7d8797"}
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
for y, model in enumerate(large.values()):
    for x, block in enumerate(model.model.layers):
        axes.add_patch(Rectangle((x, y), 0.9, 0.5, color=COLORS[mixer(block)], linewidth=0))
        axes.add_patch(Rectangle((x, y + 0.5), 0.9, 0.25, color=COLORS[feed_forward(block)], linewidth=0))
        if getattr(block, "ple", None) is not None:
            axes.text(x + 0.45, y + 0.27, "n", ha="center", va="center", fontsize=6, color="white")
axes.set(xlim=(0, 65), ylim=(len(large), -0.1), xlabel="layer")
axes.set_yticks([y + 0.37 for y in range(len(large))], list(large), fontsize=7)
axes.spines[:].set_visible(False)
axes.legend([Rectangle((0, 0), 1, 1, color=c) for c in COLORS.values()], list(COLORS), fontsize=7, ncols=4, frameon=False,
            loc="lower center", bbox_to_anchor=(0.5, 1))  # fmt: skip
plt.show()
for name in ("Qwen3-Next-80B-A3B", "Qwen3.5-27B", "Qwen3.5-35B-A3B", "Qwen4-Exp"):
    kinds = [mixer(block) for block in large[name].model.layers]
    assert kinds == [*["delta net"] * 3, kinds[3]] * (len(kinds) // 4)  # three of four, throughout

# %% [markdown]
# ## Where the parameters are
#
# More than half of a dense model is feed-forward. More than half of a mixture is experts that a given token does not pass
# through. And of the n-gram table of Qwen4-Exp, larger than most models here, a token reads sixteen rows.

# %%
PARTS = {"embedding, head": "embed_tokens|lm_head", "attention": "self_attn|\\.attn\\.", "delta nets": "linear_attn",
         "n-gram table": "ngram_embedding", "experts": r"\.experts\.", "feed-forward": "mlp"}  # fmt: skip


def parts_of(model):
    """Parameters by part; experts are split into those that a token passes and the others."""
    found = Counter()
    for name, p in model.named_parameters():
        found[next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")] += p.numel()
    if experts := found.pop("experts", 0):
        found["experts, active"] = experts * model.config.num_experts_per_tok // model.config.num_experts
        found["experts, idle"] = experts - found["experts, active"]
    return found


sizes = {name: parts_of(model) for name, model in large.items()}
total = {name: sum(found.values()) for name, found in sizes.items()}
active = {name: total[name] - found["experts, idle"] - found["n-gram table"] for name, found in sizes.items()}
for name, found in sizes.items():
    print(f"{name:19} {total[name] / 1e9:7.2f} billion parameters, {active[name] / 1e9:6.2f} at work for a token")
    assert total[name] == large[name].num_parameters()
    assert max(found["feed-forward"], found["experts, idle"]) > total[name] / 2
assert large["Qwen4-Exp"].config.ngram_heads == 16
assert sorted(total.values())[5] < sizes["Qwen4-Exp"]["n-gram table"]

tints = {
    "embedding, head": STYLE.muted, "attention": STYLE.lines[0], "delta nets": STYLE.lines[1], "feed-forward": STYLE.lines[2],
    "experts, active": STYLE.lines[4], "experts, idle": "#d7dbe2", "n-gram table": STYLE.lines[3], "other": STYLE.ink,
}  # fmt: skip
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
for y, found in enumerate(sizes.values()):
    left, whole = 0, sum(found.values())
    for part, tint in tints.items():
        axes.barh(y, found[part] / whole, left=left, color=tint, label=part if not y else None)
        left += found[part] / whole
axes.set_yticks(range(len(sizes)), list(sizes), fontsize=7)
axes.invert_yaxis()
axes.set(xlim=(0, 1), xlabel="share of all parameters")
axes.legend(fontsize=7, ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# The names promise a size: 7B in all, 80B of which 3 are active. They keep it, to within a billion.

# %%
for name in large:
    if promised := re.findall(r"(?<=-)(A?)([\d.]+)B", name):
        for kind, number in promised:  # "" for all, "A" for those at work
            measured = (active[name] if kind else total[name]) / 1e9
            print(f"{name:19} promises {kind + number:>4} billion, has {measured:5.2f}")
            assert abs(measured - float(number)) < 1

# %% [markdown]
# ## What a conversation costs
#
# What a model must hold of one conversation grows by the token for layers that keep keys, and not at all for those that keep a
# state. The small models tell both: from the bytes of their caches after 40 tokens and after 41.


# %%
def measured(model):
    """(bytes per token, constant bytes) of the cache, in the model's dtype."""
    sizes = []
    for tokens in (40, 41):
        cache = model.make_cache()
        model(torch.arange(tokens)[None], cache=cache)
        sizes.append(cache.snapshot().nbytes())
    return sizes[1] - sizes[0], sizes[0] - 40 * (sizes[1] - sizes[0])


def counted(config, itemsize):
    """The same from the sizes: keys and values, index keys, states in fp32, and the inputs that convolutions remember."""
    keeping = len(config.windows)  # layers that keep keys
    growing = keeping * itemsize * (2 * config.num_key_value_heads * config.head_dim + getattr(config, "indexer_head_dim", 0))
    if keeping == config.num_hidden_layers:
        return growing, 0
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * key + heads * value
    state = 4 * heads * key * value + itemsize * channels * config.linear_conv_kernel_dim
    constant = (config.num_hidden_layers - keeping) * state
    for _ in getattr(config, "ple_layer_ids", ()):
        reach = (config.ple_conv_kernel_size - 1) * config.ngram_size
        constant += itemsize * config.hc_count * config.hidden_size * reach + 8 * (config.ngram_size - 1)  # and token ids
    return growing, constant


for name, model in models.items():
    assert measured(model) == counted(model.config, itemsize=4), name

print(f"{'':19} query/key heads   layers with keys   per token   constant   at 32,768 tokens")
for name, model in large.items():
    c, (growing, constant) = model.config, counted(model.config, itemsize=2)
    heads = f"{c.num_attention_heads}/{c.num_key_value_heads}"
    print(f"{name:19} {heads:>15} {len(c.windows):12} of {c.num_hidden_layers} {growing / 1024:8.0f} kB "
          f"{constant / 1e6:7.1f} MB {(32768 * growing + constant) / 1e9:15.2f} GB")

figure, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
lengths = [2**i for i in range(8, 19)]
for i, (name, model) in enumerate(large.items()):
    growing, constant = counted(model.config, itemsize=2)
    axes.loglog(lengths, [(n * growing + constant) / 1e9 for n in lengths], "-" if i < 6 else "--", label=name,
                color=STYLE.lines[i % 6])  # fmt: skip
axes.set(xlabel="tokens", ylabel="GB of one conversation")
axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# (Qwen2.5-7B and its variant for a million tokens cost the same, so they share a line.)
#
# ## The tree
#
# Years from top to bottom; under each name what changed from the model above it, as the traits have it. Blue has experts.
# Dashed lines lead to a second parent.

# %%
PLACES = {  # across, down
    "Qwen 1": (1, 0), "Qwen2": (1, 0.8), "Qwen2 MoE": (2, 1.1), "Qwen2.5-1M": (0, 2), "Qwen3": (1, 2.2), "Qwen3 MoE": (2, 2.5),
    "Qwen3-Next": (2, 3.3), "Qwen3.5": (1, 4.6), "Qwen3.5 MoE": (2, 4.9), "Qwen4-Exp": (2, 5.9),
}  # fmt: skip


def sentence(trait, value):
    return f"+ {trait}" if value == "yes" else f"− {trait}" if value in ("no", "none") else f"{trait}: {value}"


figure, axes = plt.subplots(figsize=(8.5, 8), layout="constrained")
for name, kin in FAMILY.items():
    x, y = PLACES[name]
    for parent, dash in zip(kin.parents, ("-", "--"), strict=False):
        px, py = PLACES[parent]
        axes.plot([px, x, x], [py, py, y], dash, color=STYLE.muted, linewidth=1, zorder=0)
    color = STYLE.lines[0 if traits[name]["feed-forward"] == "experts" else 2]
    axes.text(x, y, name, ha="center", va="center", fontsize=9, color="white", weight="bold",
              bbox={"boxstyle": "round,pad=0.4", "facecolor": color, "edgecolor": "none"})  # fmt: skip
    news = [sentence(trait, value) for trait, value in changes(name).items()]
    axes.text(x + 0.05, y + 0.16, "\n".join(news), ha="left", va="top", fontsize=6.5, color=STYLE.ink)
for year in sorted({kin.year for kin in FAMILY.values()}):
    top = min(PLACES[name][1] for name, kin in FAMILY.items() if kin.year == year) - 0.25
    axes.axhline(top, color=STYLE.faint, linewidth=1, zorder=-1)
    axes.text(-0.55, top + 0.05, year, va="top", fontsize=9, color=STYLE.muted)
axes.set(xlim=(-0.6, 2.8), ylim=(6.7, -0.3))
axes.axis("off")
plt.show()

# %% [markdown]
# ## Whose child is this?
#
# The questions can be put to any model. Here is one with trained weights, and how many of its traits each of the family shares.

# %%
stranger, _ = qr.load(MODEL, device="cpu", dtype="float32", progress=False)
own = traits_of(stranger, look(stranger))
shared = {name: sum(own[trait] == theirs[trait] for trait in TRAITS) for name, theirs in traits.items()}
for name in sorted(shared, key=shared.get, reverse=True)[:3]:
    print(f"{name:12} {shared[name]} of {len(TRAITS)} traits in common")
nearest = max(shared, key=shared.get)
print(f"-> {MODEL} is a {nearest}; its config says {stranger.config.model_type}")
assert FAMILY[nearest].config["model_type"] == stranger.config.model_type

# %% [markdown]
# ## The same on a real model
#
# Set `MODEL = "Qwen/Qwen3-0.6B"` in the first cell, or any other of the family, and run the last cell again (a download of
# 1.5 GB, and 3 GB of memory in 32-bit). `qwen-ref inspect MODEL` counts parameters and cache of a checkpoint from its config
# alone.
