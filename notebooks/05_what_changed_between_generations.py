# %% [markdown]
# # What changed between generations: from Qwen2 to Qwen3
#
# Two model files, a year apart. Their difference is printed here, then run: a Qwen2 is rebuilt out of Qwen3's classes, and
# a trained Qwen3 out of Qwen2's, until both compute the same numbers to the last bit. What remains different after that is
# the difference between the generations, and the second half of the notebook measures what each part of it does.

# %%
import difflib
import inspect

import torch
from torch import nn

import qwen_ref as qr
from qwen_ref.models import qwen2, qwen3

MODEL = "tiny"  # a trained Qwen3

torch.manual_seed(0)
torch.set_grad_enabled(False)
qr.backend.use("eager")  # run every operation as its formula stands, not as a fused kernel
print(qwen2.__doc__)
print(qwen3.__doc__)

# %% [markdown]
# ## The difference as text
#
# Each generation is one file. Classes that did not change have the same source in both.


# %%
def source(thing):
    return inspect.getsource(thing).splitlines()


for name in ("Attention", "SparseMoE", "Block", "Decoder", "Model"):
    before, after = source(getattr(qwen2, name)), source(getattr(qwen3, name))
    changed = sum(line[0] in "+-" for line in difflib.ndiff(before, after))
    print(f"{name:10} {len(after):3} lines, {changed or 'none'} changed")

# %%
print("\n".join(difflib.unified_diff(source(qwen2.Attention), source(qwen3.Attention), "qwen2", "qwen3", n=0, lineterm="")))

# %%
print("\n".join(difflib.unified_diff(source(qwen2.SparseMoE), source(qwen3.SparseMoE), "qwen2", "qwen3", n=0, lineterm="")))

# %% [markdown]
# ## The difference as tensors
#
# Two small models with random weights. `TINY` is a config whose sizes all differ, so that no swapped axis can hide. Biases
# and norm weights are drawn at random too: left at 0 and 1 they would make the two models look more alike than they are.


# %%
def random_model(module, config):
    model = module.Model(module.Config.from_json(config)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        spread = 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5
        p.copy_(torch.randn(p.shape) * spread + name.endswith("norm.weight"))
    return model


old = random_model(qwen2, qwen2.TINY)
new = random_model(qwen3, qwen3.TINY)
ours, theirs = dict(old.named_parameters()), dict(new.named_parameters())
print("only in Qwen2:", [n for n in ours if n not in theirs and ".0." in n])
print("only in Qwen3:", [n for n in theirs if n not in ours and ".0." in n])
print("q_proj of Qwen2:", [*ours["model.layers.0.self_attn.q_proj.weight"].shape], " heads * head_dim = hidden")
print("q_proj of Qwen3:", [*theirs["model.layers.0.self_attn.q_proj.weight"].shape], "heads * head_dim is free")

# %% [markdown]
# ## Qwen2 out of Qwen3's classes
#
# Take a Qwen3 of the same sizes, put nothing in the place of its two norms, give its three projections a bias, and load the
# Qwen2's weights. The logits are equal to the last bit.

# %%
config = {**qwen2.TINY, "model_type": "qwen3", "attention_bias": True, "head_dim": old.config.head_dim}
rebuilt = qwen3.Model(qwen3.Config.from_json(config)).eval()
for block in rebuilt.model.layers:
    block.self_attn.q_norm = nn.Identity()
    block.self_attn.k_norm = nn.Identity()
    block.self_attn.o_proj.bias = None  # Qwen3's switch puts a bias on all four projections, Qwen2 has it on three
rebuilt.load_state_dict(old.state_dict())  # strict: every name is there, and no other

ids = torch.randint(0, old.config.vocab_size, (2, 17))  # (B, T)
print("largest difference of any logit:", (rebuilt(ids) - old(ids)).abs().max().item())
assert torch.equal(rebuilt(ids), old(ids))

# %% [markdown]
# ## A trained Qwen3 out of Qwen2's classes
#
# The other way round. Qwen2's attention rotates whatever `q_proj` and `k_proj` return, so the norms go in there, behind the
# projection; the biases go. Everything else is Qwen2's code, and it runs a trained Qwen3.

# %%
trained, tokenizer = qr.load(MODEL, device="cpu", dtype="float32", progress=False)


class NormedProjection(nn.Module):
    """A projection whose result is normalised head by head."""

    def __init__(self, projection, norm):
        super().__init__()
        self.projection, self.norm = projection, norm

    def forward(self, x):  # (B, T, H) -> (B, T, heads * D)
        heads = self.projection(x).unflatten(-1, (-1, self.norm.weight.shape[0]))  # (B, T, heads, D)
        return self.norm(heads).flatten(-2)


with torch.device("meta"):  # names and shapes only; the weights are the trained model's own
    twin = qwen2.Model(qwen2.Config.from_json({**trained.config.to_json(), "model_type": "qwen2"})).eval()
missing = twin.load_state_dict(trained.state_dict(), strict=False, assign=True).missing_keys
print("not in a Qwen3:", [name for name in missing if ".0." in name])
for block, theirs in zip(twin.model.layers, trained.model.layers, strict=True):
    attention = block.self_attn
    attention.q_proj.bias = attention.k_proj.bias = attention.v_proj.bias = None
    attention.q_proj = NormedProjection(attention.q_proj, theirs.self_attn.q_norm)
    attention.k_proj = NormedProjection(attention.k_proj, theirs.self_attn.k_norm)

text = "Once upon a time, there was a little dog. He liked to play in the park with his friend, and one day"
ids = torch.tensor([tokenizer.encode(text)])
print("largest difference of any logit:", (twin(ids) - trained(ids)).abs().max().item())
assert torch.equal(twin(ids), trained(ids))
results = [qr.generate(model, tokenizer, text, max_tokens=24, temperature=0)[0].text for model in (twin, trained)]
print("as a Qwen2:", repr(results[0]))
print("as a Qwen3:", repr(results[1]))
assert results[0] == results[1]

# %% [markdown]
# ## Mixture of experts
#
# Qwen2's sparse layer adds one *shared* expert that every token takes, behind a sigmoid gate:
#
# $$y = \sum_{e \in \text{top-}k} p_e\, f_e(x) + \sigma(g \cdot x)\, f_\text{shared}(x).$$
#
# Qwen3 has no shared expert, and divides the chosen probabilities by their sum, so that they add up to one. Silence the
# shared expert and set the switch, and the rest of a Qwen3 fits in.

# %%
sparse3 = random_model(qwen3, qwen3.TINY_MOE)
raw = sparse3.config.to_json()
sparse2 = qwen2.Model(
    qwen2.Config.from_json(
        {**raw, "model_type": "qwen2_moe", "qkv_bias": False, "shared_expert_intermediate_size": 1, "norm_topk_prob": True}
    )
).eval()
for block, theirs in zip(sparse2.model.layers, sparse3.model.layers, strict=True):
    attention = block.self_attn
    attention.q_proj = NormedProjection(attention.q_proj, theirs.self_attn.q_norm)
    attention.k_proj = NormedProjection(attention.k_proj, theirs.self_attn.k_norm)
    if hasattr(block.mlp, "shared_expert"):
        block.mlp.shared_expert.down_proj.weight.zero_()
weights = sparse3.state_dict()
for name in list(weights):  # the two wrapped projections have one more step in their name
    if "q_proj" in name or "k_proj" in name:
        weights[name.replace("_proj.weight", "_proj.projection.weight")] = weights.pop(name)
sparse2.load_state_dict({name: w for name, w in weights.items() if "_norm." not in name}, strict=False)

few = torch.randint(0, sparse3.config.vocab_size, (2, 17))
print("largest difference of any logit:", (sparse2(few) - sparse3(few)).abs().max().item())
assert torch.equal(sparse2(few), sparse3(few))

# %% [markdown]
# ## What the norms do: scores have a bound
#
# A normed query has root mean square one, so before its weight its length is $\sqrt D$; likewise a key. The weights
# stretch them by at most their largest entry, and the rotation changes no length. By Cauchy and Schwarz
#
# $$\left|\frac{q \cdot k}{\sqrt D}\right| \;\le\; \frac{(\sqrt D \max_j |w^q_j|)\,(\sqrt D \max_j |w^k_j|)}{\sqrt D}
#   \;=\; \sqrt D\, \max_j |w^q_j|\, \max_j |w^k_j|.$$
#
# Whatever the input and however large $W_q$ and $W_k$ have grown, a score cannot pass it. That is what the norms are for:
# without them training can drive scores up until the softmax is all but an arg max and its gradient is gone.


# %%
def largest_scores(model, ids):
    _, acts = model.run_with_cache(ids, "blocks.*.attn.hook_attn_scores")
    seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    return [scores[..., seen].abs().max().item() for scores in acts.values()]


print("layer  largest |score|   bound")
for i, largest in enumerate(largest_scores(trained, ids)):
    a = trained.model.layers[i].self_attn
    bound = a.head_dim**0.5 * a.q_norm.weight.abs().max().item() * a.k_norm.weight.abs().max().item()
    print(f"{i:5}  {largest:15.2f}  {bound:6.1f}")
    assert largest <= bound

# %% [markdown]
# The same experiment on the two random models: multiply every $W_q$ by 1000. In Qwen2 the scores follow. In Qwen3 nothing
# happens, because dividing by the root mean square takes the factor out again.

# %%
few = torch.randint(0, 211, (1, 17))
for name, model in (("Qwen2", old), ("Qwen3", new)):
    before = max(largest_scores(model, few))
    for block in model.model.layers:
        block.self_attn.q_proj.weight.mul_(1000)
    print(f"{name}: largest score {before:6.2f}, with 1000 W_q: {max(largest_scores(model, few)):10.2f}")
    for block in model.model.layers:
        block.self_attn.q_proj.weight.div_(1000)

# %% [markdown]
# A trained model uses this freedom: here is the root mean square that its norms divide queries by, smallest and largest of
# any token and head in a layer. Behind the norm all of them are one.

# %%
_, acts = trained.run_with_cache(ids, "blocks.*.attn.hook_q")
for i in range(trained.config.num_hidden_layers):
    rms = acts["q", i].square().mean(-1).sqrt()  # (B, T, N)
    print(f"layer {i}: {rms.min():5.2f} to {rms.max():5.2f}")

# %% [markdown]
# ## What the biases did: a preference for distances
#
# With biases $b_q, b_k$ a score has a part that no token enters. The rotation $R_m$ by position $m$ leaves of it
#
# $$(R_t b_q) \cdot (R_s b_k) = b_q \cdot R_{s-t}\, b_k,$$
#
# a learned function of the distance alone. To see it, the two weight matrices of a Qwen2 layer are set to zero so that only
# the biases are left: every diagonal of the score matrix is then constant, whatever the text.

# %%
attention = old.model.layers[0].self_attn
kept = attention.q_proj.weight.clone(), attention.k_proj.weight.clone()
attention.q_proj.weight.zero_()
attention.k_proj.weight.zero_()
_, acts = old.run_with_cache(torch.randint(0, 211, (1, 17)), "blocks.0.attn.hook_attn_scores")
attention.q_proj.weight.copy_(kept[0])
attention.k_proj.weight.copy_(kept[1])

head = acts["attn_scores", 0][0, 0]  # (T, T)
for distance in range(4):
    diagonal = head.diagonal(-distance)
    print(f"distance {distance}: score {diagonal.mean():8.4f}, spread along the diagonal {diagonal.max() - diagonal.min():.0e}")
    torch.testing.assert_close(diagonal, diagonal.mean().expand_as(diagonal), rtol=0, atol=1e-5)

# %% [markdown]
# Qwen3 has no biases, and its norm weights multiply what a token brings: no score is left when the tokens bring nothing.
#
# ## What a free head dimension does: official sizes
#
# In Qwen2 the heads divide the hidden size between them. In Qwen3 the head dimension is 128 in small and large models alike,
# so the attention of a small one can be wider than its residual stream. Counted on the `meta` device, which holds no memory:

# %%
qwen25_05b = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
qwen3_06b = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
print(f"{'':14}{'parameters':>12}{'embedding':>12}{'attention':>12}{'mlp':>12}   H   heads*D  cache per token")
for name, module, raw in (("Qwen2.5-0.5B", qwen2, qwen25_05b), ("Qwen3-0.6B", qwen3, qwen3_06b)):
    with torch.device("meta"):
        model = module.Model(module.Config.from_json(raw))
    size = {part: sum(p.numel() for n, p in model.named_parameters() if part in n) for part in ("embed", "self_attn", "mlp")}
    c = model.config
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    print(f"{name:14}{model.num_parameters():12,}{size['embed']:12,}{size['self_attn']:12,}{size['mlp']:12,}"
          f"{c.hidden_size:6}{c.num_attention_heads * c.head_dim:8}{cache:11,} numbers")

# %% [markdown]
# The smaller feed-forward pays for the wider attention, and the four times as many key/value heads of twice the width are
# paid for in cache.
#
# ## The same on a real model
#
# Set `MODEL = "Qwen/Qwen3-0.6B"` in the first cell and run all cells again: the twin built from Qwen2's classes then runs
# the official weights (a download of 1.5 GB, and 3 GB of memory in 32-bit).
