"""Named activations: what is captured equals what was computed elsewhere, an edit does what its name says, and nothing stays."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, casts_lifted, make_pair
from torch import nn

import qwen_ref as qr
from qwen_ref import backend, hooks, ops
from qwen_ref.errors import RequestError
from qwen_ref.hook_points import final_path, points
from qwen_ref.hooks import select
from qwen_ref.verify import capture

ALL = [pytest.param(config, id=name) for name, (_, config) in TINY.items()]
IDS = torch.randint(0, 211, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def eager():
    """Without it every pattern would announce that it leaves the fused kernel; one test below looks at that."""
    with backend.use({"attention": "eager", "sparse_block_attention": "eager"}), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def dense():
    return make_pair(TINY["qwen3"][1])[0]


@pytest.fixture(scope="module")
def moe():
    return make_pair(TINY["qwen3_moe"][1])[0]


# ------------------------------------------------------------------------------------------------- names and order


@pytest.mark.parametrize("config", ALL)
def test_names_are_complete_and_in_order_of_computation(config):
    """The order in which the functions are called is the order of `list_hooks`, and every point is called once."""
    model, _ = make_pair(config)
    called = []
    with model.hooks([("*hook_*", lambda value, hook: called.append(hook.name))]):
        model(IDS)
    assert called == model.list_hooks()
    shapes = {"B": 2, "T": 9, "S": 9, "H": config["hidden_size"], "N": 6, "K": 2, "D": model.config.head_dim, "I": model.config.intermediate_size,
              "E": 7, "k": config.get("num_experts_per_tok"), "V": 211, "1": 1, "G": 3, "P": 9, "c": 14, "d": 10,
              "s": 3, "p": 4, "q": 3, "h": 8, "i": 20, "g": 8, "e": 4}  # fmt: skip
    _, acts = model.run_with_cache(IDS, "*hook_*")
    for name, point in points(model).items():
        assert list(acts[name].shape) == [shapes[letter] for letter in point.dims], name


def test_names_are_transformerlens_names(dense, moe):
    block = "blocks.2."
    assert {f"{block}hook_{x}" for x in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")} <= {*dense.list_hooks()}
    inner = ("q", "k", "v", "z", "attn_scores", "pattern", "rot_q", "rot_k", "result", "q_normed", "k_normed")
    assert {f"{block}attn.hook_{x}" for x in inner} <= {*dense.list_hooks()}
    assert {f"{block}{n}.hook_{x}" for n in ("ln1", "ln2") for x in ("scale", "normalized")} <= {*dense.list_hooks()}
    assert {f"{block}mlp.hook_{x}" for x in ("pre", "pre_linear", "post")} <= {*dense.list_hooks()}
    routed = {f"{block}mlp.hook_{x}" for x in ("router_logits", "router_probs", "topk_idx", "topk_weights")}
    assert routed <= {*moe.list_hooks()} and not routed & {*dense.list_hooks()}
    assert dense.list_hooks()[0] == "hook_embed" and dense.list_hooks()[-1] == "hook_logits"
    qwen2, _ = make_pair(TINY["qwen2"][1])
    assert "blocks.0.attn.hook_q_normed" not in qwen2.list_hooks()


# ------------------------------------------------------------------------------------------------- what is captured


@pytest.mark.parametrize("config", ALL)
def test_captured_values_are_those_of_transformers(config):
    ours, theirs = make_pair(config, torch.float64)
    logits, acts = ours.run_with_cache(IDS, "*hook_*")
    with casts_lifted(theirs):
        expected = capture(theirs, IDS)

    def close(name, value):
        torch.testing.assert_close(acts[name].reshape(value.shape), value, atol=1e-10, rtol=1e-9)

    close("hook_embed", expected["model.embed_tokens"])
    close("hook_logits", expected["lm_head"])
    assert torch.equal(acts["hook_logits"], logits)
    for i in range(3):
        path, name = f"model.layers.{i}", f"blocks.{i}"
        streams = hasattr(ours.model.layers[i], "attn_hyper_connection")
        close(f"{name}.ln1.hook_out", expected[f"{path}.{'attn_hyper_connection' if streams else 'input_layernorm'}"])
        if linear := hasattr(ours.model.layers[i], "linear_attn"):
            close(f"{name}.attn.hook_z", expected[f"{path}.linear_attn.norm"])
        else:
            q = expected[f"{path}.self_attn.q_proj"]
            if "linear_num_key_heads" in config:  # with the gate, head by head
                q, gate = q.unflatten(-1, (6, -1)).chunk(2, -1)
                close(f"{name}.attn.hook_gate", gate)
            close(f"{name}.attn.hook_q", q)
            for part in "kv":
                close(f"{name}.attn.hook_{part}", expected[f"{path}.self_attn.{part}_proj"])
            close(f"{name}.attn.hook_pattern", expected[f"{path}.self_attn[1]"])  # eager attention returns it
        close(f"{name}.hook_attn_out", expected[f"{path}.{'linear_attn' if linear else 'self_attn'}"])
        close(f"{name}.hook_mlp_out", expected[f"{path}.mlp"])
        close(f"{name}.hook_resid_post", expected[path])
    close("ln_final.hook_out", expected[final_path(ours)])


def test_attention_by_hand(dense):
    _, acts = dense.run_with_cache(IDS, "*hook_*")
    attn, path = dense.model.layers[1].self_attn, "blocks.1.attn.hook"
    x = acts["blocks.1.ln1.hook_out"]
    q = (x @ attn.q_proj.weight.T).view(2, 9, 6, 20)
    k, v = ((x @ p.weight.T).view(2, 9, 2, 20) for p in (attn.k_proj, attn.v_proj))
    close = torch.testing.assert_close
    close(acts[f"{path}_q"], q)
    close(acts[f"{path}_v"], v)
    q = q / (q.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * attn.q_norm.weight
    k = k / (k.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * attn.k_norm.weight
    close(acts[f"{path}_q_normed"], q)
    close(acts[f"{path}_k_normed"], k)
    angle = torch.arange(9)[:, None] / 10000.0 ** (torch.arange(0, 20, 2) / 20)  # (T, D/2)

    def rotate(x):  # as complex numbers x_j + i x_{j+D/2}
        turned = torch.complex(x[..., :10], x[..., 10:]) * torch.polar(torch.ones(()), angle)[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    q, k = rotate(q), rotate(k)
    close(acts[f"{path}_rot_q"], q, atol=1e-5, rtol=1e-5)
    close(acts[f"{path}_rot_k"], k, atol=1e-5, rtol=1e-5)
    scores = torch.einsum("btnd,bsnd->bnts", q, k.repeat_interleave(3, 2)) / 20**0.5
    seen = torch.ones(9, 9).tril().bool()
    close(acts[f"{path}_attn_scores"][..., seen], scores[..., seen], atol=1e-5, rtol=1e-5)
    pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    close(acts[f"{path}_pattern"], pattern, atol=1e-5, rtol=1e-5)
    z = torch.einsum("bnts,bsnd->btnd", pattern, v.repeat_interleave(3, 2))
    close(acts[f"{path}_z"], z, atol=1e-5, rtol=1e-5)
    close(acts[f"{path}_result"].sum(2), acts["blocks.1.hook_attn_out"], atol=1e-5, rtol=1e-5)
    one = z[:, :, 4] @ attn.o_proj.weight[:, 80:100].T  # head 4 alone
    close(acts[f"{path}_result"][:, :, 4], one, atol=1e-5, rtol=1e-5)


def test_pattern_is_that_of_ops_and_sums_to_one(dense):
    _, acts = dense.run_with_cache(IDS, ["*rot_?", "*pattern"])
    q, k = (acts[f"rot_{x}", 2].transpose(1, 2) for x in "qk")
    assert torch.equal(acts["pattern", 2], ops.attention_pattern(q, k))
    torch.testing.assert_close(acts["pattern", 2].sum(-1), torch.ones(2, 6, 9))
    assert acts["pattern", 2].triu(1).abs().max() == 0


@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_stream_adds_up_to_the_last_bit(config, dtype):
    model, _ = make_pair(config, dtype)
    _, acts = model.run_with_cache(IDS, "*")

    def added(i, part):  # to each of the streams, if there are several
        out = acts[f"{part}_out", i]
        if f"blocks.{i}.hook_{part}_inject" not in acts:
            return out
        return acts[f"{part}_inject", i][..., None] * out[:, :, None]

    for i in range(3):
        before = acts["resid_pre", i]
        before = before + acts["out", i, "ple"] if f"blocks.{i}.ple.hook_out" in acts else before
        assert torch.equal(acts["resid_mid", i], before + added(i, "attn"))
        assert torch.equal(acts["resid_post", i], acts["resid_mid", i] + added(i, "mlp"))
        assert acts["resid_post", i].dtype == dtype
    first = acts["resid_pre", 0]
    assert torch.equal(first, acts["hook_embed"] if first.dim() == 3 else acts["hook_embed"][:, :, None].expand_as(first)) and torch.equal(acts["resid_pre", 2], acts["resid_post", 1])


def test_norms_and_feed_forward_by_hand(dense):
    _, acts = dense.run_with_cache(IDS, "*")
    x, block = acts["resid_mid", 1].double(), dense.model.layers[1]
    scale = (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(acts["scale", 1, "ln2"].double(), scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(acts["normalized", 1, "ln2"].double(), x / scale, rtol=1e-5, atol=1e-6)
    normed = acts["out", 1, "ln2"]
    torch.testing.assert_close(normed, (x / scale).float() * block.post_attention_layernorm.weight, rtol=1e-5, atol=1e-6)
    gate, up = normed @ block.mlp.gate_proj.weight.T, normed @ block.mlp.up_proj.weight.T
    torch.testing.assert_close(acts["pre", 1, "mlp"], gate)
    torch.testing.assert_close(acts["pre_linear", 1, "mlp"], up)
    torch.testing.assert_close(acts["post", 1, "mlp"], F.silu(gate) * up)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_router_by_hand(kind):
    model, _ = make_pair(TINY[kind][1])
    _, acts = model.run_with_cache(IDS, "*")
    mlp = model.model.layers[2].mlp
    x = acts["out", 2, "ln2"]
    logits = x @ mlp.gate.weight.T
    torch.testing.assert_close(acts["router_logits", 2], logits)
    torch.testing.assert_close(acts["router_probs", 2], logits.softmax(-1))
    weights, experts = logits.softmax(-1).sort(-1, descending=True)
    weights, experts = weights[..., :3], experts[..., :3]
    assert torch.equal(acts["topk_idx", 2], experts)
    if mlp.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(acts["topk_weights", 2], weights)
    out = acts["expert_out", 2]
    if kind == "qwen2_moe":
        out = out + acts["shared_gate", 2].sigmoid() * acts["shared_out", 2]
    torch.testing.assert_close(out, acts["mlp_out", 2])
    assert "blocks.1.mlp.hook_pre" in acts  # layer 1 is dense


@pytest.mark.parametrize("config", ALL)
def test_capture_changes_nothing(config):
    model, _ = make_pair(config)
    logits, acts = model.run_with_cache(IDS, "*")
    assert torch.equal(logits, model(IDS))
    before = acts["resid_post", 0].clone()
    model(IDS.flip(1))
    assert torch.equal(acts["resid_post", 0], before)  # a copy, not a view of what the model works with


# ------------------------------------------------------------------------------------------------- prefill, decode, batches


@pytest.mark.parametrize("config", ALL)
def test_decode_token_by_token_captures_what_prefill_captures(config):
    model, _ = make_pair(config, torch.float64)
    _, whole = model.run_with_cache(IDS, "*hook_*")
    cache, steps = model.make_cache(), []
    for t in range(9):
        steps.append(model.run_with_cache(IDS[:, t : t + 1], "*hook_*", cache=cache)[1])
    for name, point in points(model).items():
        if name.endswith("attn.hook_state"):  # after the last token of a pass
            torch.testing.assert_close(steps[-1][name], whole[name], atol=1e-11, rtol=1e-9)
            continue
        if "hook_index" in name:  # while everything may be read, nothing is chosen
            continue
        if point.dims == "BPTT":  # the delta rule as attention among the tokens of one pass
            for t, step in enumerate(steps):
                torch.testing.assert_close(step[name][..., 0], whole[name][..., t, t, None], atol=1e-11, rtol=1e-9)
            continue
        for t, step in enumerate(steps):
            expected = whole[name].narrow(point.dims.index("T"), t, 1)
            if "S" in point.dims:
                expected = expected[..., : t + 1]
            torch.testing.assert_close(step[name], expected, atol=1e-11, rtol=1e-9, msg=lambda m, name=name, t=t: f"{name} {t}: {m}")


def test_left_padding_captures_what_the_sequence_alone_does(dense, moe):
    """Position -1 is padding; each row's own tokens are as if it were alone."""
    for model in (dense, moe):
        positions = torch.arange(9).repeat(2, 1)
        positions[1] = torch.tensor([-1, -1, -1, 0, 1, 2, 3, 4, 5])
        _, both = model.run_with_cache(IDS, "*", positions=positions)
        _, alone = model.run_with_cache(IDS[1:, 3:], "*")
        for name, point in points(model).items():
            got = both[name][1:].narrow(point.dims.index("T"), 3, 6)
            if "S" in point.dims:
                got = got[..., 3:]
            if not name.endswith("attn_scores"):  # hidden keys hold the lowest number in both, visible ones follow below
                torch.testing.assert_close(got, alone[name], atol=2e-5, rtol=1e-4)
        assert both["pattern", 1][1, :, 3:, :3].abs().max() == 0


def test_hooks_fire_in_generate():
    model, tokenizer = qr.load("tiny")
    seen = []
    with model.hooks([("blocks.2.attn.hook_pattern", lambda value, hook: seen.append(tuple(value.shape[2:])))]):
        with_hook = qr.generate(model, tokenizer, "Once upon a time", max_tokens=4, temperature=0)[0]
    prompt = len(tokenizer.encode("Once upon a time"))
    assert seen == [(prompt, prompt)] + [(1, prompt + i) for i in range(1, len(seen))] and len(seen) >= 4
    plain = qr.generate(model, tokenizer, "Once upon a time", max_tokens=4, temperature=0)[0]
    assert with_hook.token_ids == plain.token_ids

    def other(value, hook):
        return value.roll(1, -1)

    with model.hooks([("hook_logits", other)]):
        moved = qr.generate(model, tokenizer, "Once upon a time", max_tokens=1, temperature=0)[0]
    assert moved.token_ids[0] == (plain.token_ids[0] + 1) % model.config.vocab_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, _ = make_pair(TINY["qwen3_moe"][1], dtype)
    plain = model(IDS)
    logits, acts = model.run_with_cache(IDS, "*")
    assert torch.equal(logits, plain)
    assert acts["pattern", 0].dtype == acts["topk_weights", 0].dtype == dtype and acts["topk_idx", 0].dtype == torch.int64
    assert torch.equal(model.run_with_hooks(IDS, [("*hook_*", lambda value, hook: value * 1 if hook.editable else None)]), plain)


# ------------------------------------------------------------------------------------------------- editing


def _edited(value, hook):
    """Something else that the point may hold."""
    if hook.short in ("topk_idx", "rows", "index_blocks"):
        return (value + 1) % 7
    return -value if hook.short == "index_scores" else value * 0.5 + 0.1


@pytest.mark.parametrize("config", ALL)
def test_every_point_can_be_edited_and_an_identity_edit_changes_nothing(config):
    model, _ = make_pair(config)
    plain = model(IDS)
    rest = [name for name in model.list_hooks() if "result" not in name]
    assert torch.equal(model.run_with_hooks(IDS, [(rest, lambda value, hook: value.clone())]), plain)
    same = model.run_with_hooks(IDS, [("*hook_result", lambda value, hook: value.clone())])
    assert torch.equal(same, plain)
    for name, point in points(model).items():
        if not point.editable:
            with pytest.raises(RequestError, match=f"edit {point.instead} instead"):
                model.run_with_hooks(IDS, [(name, lambda value, hook: value * 0)])
            continue
        if name.endswith("attn.hook_state"):  # the next pass begins with it
            cache = model.make_cache()
            model(IDS[:, :4], cache=cache)
            with model.hooks([(name, _edited)]):
                again = model.make_cache()
                model(IDS[:, :4], cache=again)
            assert not torch.allclose(model(IDS[:, 4:], cache=again), model(IDS[:, 4:], cache=cache), atol=1e-3)
            continue
        edited = model.run_with_hooks(IDS, [(name, _edited)])
        assert edited.isfinite().all() and not torch.allclose(edited, plain, atol=1e-3), name
    assert torch.equal(model(IDS), plain)


def test_zero_ablating_attention_is_a_model_without_it(dense):
    other, _ = make_pair(TINY["qwen3"][1])
    other.model.layers[1].self_attn.o_proj.weight.zero_()
    edited = dense.run_with_hooks(IDS, [("blocks.1.hook_attn_out", lambda value, hook: torch.zeros_like(value))])
    assert torch.equal(edited, other(IDS))


def test_ablating_one_head_is_a_model_without_its_columns(dense):
    other, _ = make_pair(TINY["qwen3"][1])
    other.model.layers[1].self_attn.o_proj.weight[:, 40:60] = 0

    def ablate(value, hook):
        value[:, :, 2] = 0

    for name in ("blocks.1.attn.hook_z", "blocks.1.attn.hook_result"):
        edited = dense.run_with_hooks(IDS, [(name, ablate)])
        torch.testing.assert_close(edited, other(IDS), atol=1e-5, rtol=1e-5)


def test_the_bias_of_the_output_projection_is_no_heads(dense):
    """Nor is it lost when heads are edited: with all heads silent it is what attention writes."""
    model, _ = make_pair({**TINY["qwen3"][1], "attention_bias": True})
    bias = model.model.layers[1].self_attn.o_proj.bias
    caught = []
    with model.hooks([("blocks.1.attn.hook_result", lambda value, hook: value * 0),
                      ("blocks.1.hook_attn_out", lambda value, hook: caught.append(value))]):  # fmt: skip
        model(IDS)
    assert bias.abs().min() > 0 and torch.equal(caught[0], bias.expand(2, 9, 48))
    _, acts = model.run_with_cache(IDS, ["*result", "*attn_out"])
    torch.testing.assert_close(acts["result", 1].sum(2) + bias, acts["attn_out", 1], atol=1e-5, rtol=1e-5)


def test_resid_mid_edit_is_exact(dense):
    """A forward written out by hand, with the residual stream between attention and feed-forward changed in block 1."""
    shift = torch.randn(48, generator=torch.Generator().manual_seed(2))
    edited = dense.run_with_hooks(IDS, [("blocks.1.hook_resid_mid", lambda value, hook: value + shift)])
    x = dense.model.embed_tokens(IDS)
    rope = dense.model.rotary_emb(torch.arange(9)[None], x.dtype)
    for i, block in enumerate(dense.model.layers):
        x = x + block.self_attn(block.input_layernorm(x), rope, None, None)
        if i == 1:
            x = x + shift
        x = x + block.mlp(block.post_attention_layernorm(x))
    assert torch.equal(edited, dense.lm_head(dense.model.norm(x)))


def test_edit_of_the_pattern_is_exact(dense):
    """Every query looks at itself alone: the attention output is its own value, head by head."""
    own = torch.eye(9).expand(2, 6, 9, 9)
    _, acts = dense.run_with_cache(IDS, "*")
    edits = [("blocks.0.attn.hook_pattern", lambda value, hook: own.clone())]
    caught = {}
    with dense.hooks([*edits, ("blocks.0.attn.hook_z", lambda value, hook: caught.update(z=value.clone()))]):
        dense(IDS)
    assert torch.equal(caught["z"], acts["v", 0].repeat_interleave(3, 2))


def test_edits_in_cached_decode_equal_edits_in_prefill(dense):
    edit = [("blocks.*.hook_mlp_out", lambda value, hook: value * 0.5), ("blocks.1.attn.hook_rot_k", lambda value, hook: -value)]
    whole = dense.run_with_hooks(IDS, edit)
    cache = dense.make_cache()
    parts = [dense.run_with_hooks(IDS[:, t : t + 1], edit, cache=cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_editing_the_chosen_experts(moe):
    """All tokens to expert 4 with weight 1: the layer is that expert's feed-forward."""
    edits = [
        ("blocks.2.mlp.hook_topk_idx", lambda value, hook: torch.tensor([4, 0, 1]).expand_as(value).contiguous()),
        ("blocks.2.mlp.hook_topk_weights", lambda value, hook: torch.tensor([1.0, 0, 0]).expand_as(value).contiguous()),
    ]
    caught = {}
    with moe.hooks([*edits, (["blocks.2.ln2.hook_out", "blocks.2.hook_mlp_out"],
                             lambda value, hook: caught.update({hook.short: value.clone()}))]):  # fmt: skip
        moe(IDS)
    experts = moe.model.layers[2].mlp.experts
    gate, up = (caught["out"] @ experts.gate_up_proj[4].T).chunk(2, -1)
    torch.testing.assert_close(caught["mlp_out"], (F.silu(gate) * up) @ experts.down_proj[4].T, atol=1e-5, rtol=1e-5)


def test_an_edit_in_place_counts(dense):
    def zero(value, hook):
        value.zero_()

    returned = dense.run_with_hooks(IDS, [("blocks.1.hook_mlp_out", lambda value, hook: torch.zeros_like(value))])
    assert torch.equal(dense.run_with_hooks(IDS, [("blocks.1.hook_mlp_out", zero)]), returned)
    assert not torch.equal(dense(IDS), returned)


def test_functions_at_one_point_follow_each_other(dense):
    two = dense.run_with_hooks(IDS, [("hook_embed", lambda v, hook: v + 1), ("hook_embed", lambda v, hook: v * 2)])
    one = dense.run_with_hooks(IDS, [("hook_embed", lambda v, hook: (v + 1) * 2)])
    assert torch.equal(two, one)


def test_module_paths_are_names_too(dense):
    _, acts = dense.run_with_cache(IDS, ["model.layers.0.mlp.up_proj", "model.layers.1"])
    expected = capture(dense, IDS)
    assert torch.equal(acts["model.layers.0.mlp.up_proj"], expected["model.layers.0.mlp.up_proj"])
    assert torch.equal(acts["model.layers.1"], expected["model.layers.1"])
    edited = dense.run_with_hooks(IDS, [("model.layers.1.mlp", lambda value, hook: value * 0)])
    assert torch.equal(edited, dense.run_with_hooks(IDS, [("blocks.1.hook_mlp_out", lambda value, hook: value * 0)]))


# ------------------------------------------------------------------------------------------------- options


def test_filters(dense):
    assert next(iter(dense.run_with_cache(IDS)[1])) == "hook_embed"  # the default: the residual stream
    _, acts = dense.run_with_cache(IDS, lambda name: name.endswith("hook_z"))
    assert [*acts] == [f"blocks.{i}.attn.hook_z" for i in range(3)]
    assert acts.stack("z").shape == (3, 2, 9, 6, 20)
    assert torch.equal(acts["z", 1], acts["blocks.1.attn.hook_z"])
    assert dense.run_with_cache(IDS, [])[1] == {}  # nothing asked for
    with pytest.raises(RequestError, match=r"hook_z"):
        acts["zz", 1]
    with pytest.raises(RequestError, match="no layer"):
        acts.stack("pattern")


def test_stop_at_layer(dense):
    _, acts = dense.run_with_cache(IDS, "*")
    for layer, same in ((0, "hook_embed"), (1, "blocks.0.hook_resid_post"), (-1, "blocks.1.hook_resid_post")):
        residual, few = dense.run_with_cache(IDS, "*hook_resid_post", stop_at_layer=layer)
        assert torch.equal(residual, acts[same]) and len(few) == layer % 3
    for layer in (3, -4):
        with pytest.raises(RequestError, match="3 blocks"):
            dense.run_with_cache(IDS, stop_at_layer=layer)
    with pytest.raises(RequestError, match="cache"):
        dense.run_with_cache(IDS, stop_at_layer=1, cache=dense.make_cache())
    assert _clean(dense)


@pytest.mark.parametrize("where", [slice(2, 5), slice(-2, None), 0, 4, -1])
def test_pos_slice_keeps_queries_only(moe, where):
    logits, few = moe.run_with_cache(IDS, "*hook_*", pos_slice=where)
    full, acts = moe.run_with_cache(IDS, "*hook_*")
    assert torch.equal(logits, full)
    index = torch.arange(9)[where].reshape(-1)
    for name, point in points(moe).items():
        assert torch.equal(few[name], acts[name].index_select(point.dims.index("T"), index)), name
        assert few[name].untyped_storage().nbytes() == few[name].nbytes, name  # a copy: the whole is not kept alive


def test_dtype_and_device_of_what_is_kept(moe):
    _, acts = moe.run_with_cache(IDS, "*", dtype=torch.float16, device="cpu")
    assert {a.dtype for n, a in acts.items() if "topk_idx" not in n} == {torch.float16}
    assert acts["topk_idx", 0].dtype == torch.int64  # an index is not a number to round
    _, acts = moe.run_with_cache(IDS, "blocks.0.hook_resid_post", device="meta")
    assert acts["resid_post", 0].device.type == "meta"


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("where", [None, slice(1, 4)])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2_moe", "qwen3_moe"])
def test_the_byte_estimate_is_what_is_captured(kind, where, dtype):
    model, _ = make_pair(TINY[kind][1])
    options = {"pos_slice": where, "dtype": dtype}
    _, acts = model.run_with_cache(IDS, "*hook_*", **options)
    real = sum(a.nbytes for a in acts.values())
    model.run_with_cache(IDS, "*hook_*", max_bytes=real, **options)
    with pytest.raises(RequestError, match=f"{real:,} bytes") as refused:
        model.run_with_cache(IDS, "*hook_*", max_bytes=real - 1, **options)
    assert "pos_slice" in str(refused.value)


def test_the_byte_estimate_counts_cached_keys(dense):
    cache = dense.make_cache()
    dense(IDS[:, :6], cache=cache)
    with pytest.raises(RequestError, match=f"{2 * 6 * 3 * 9 * 4:,} bytes"):  # B N T S fp32
        dense.run_with_cache(IDS[:, 6:], "blocks.0.attn.hook_pattern", cache=cache, max_bytes=1)
    assert cache.length == 6  # nothing ran


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("config", ALL)
def test_a_name_that_is_taken_is_called(config):
    """Points and modules alike: what a pass never calls is refused, for a function there would never be heard of."""
    model, _ = make_pair(config)
    called, taken = set(), []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, path=path: called.add(path))
    model(IDS)
    for path, _ in model.named_modules():
        try:
            taken += select(model, path)
        except RequestError as error:
            assert path not in called - {""} and "there is no hook" in str(error)
    assert {*taken} == called - {""} and "model.layers" not in taken
    with pytest.raises(RequestError, match="chose none"), model.hooks([(lambda name: "patern" in name, print)]):
        pass


def test_unknown_names_are_refused_with_near_ones(dense):
    for wrong, near in (("blocks.1.hook_resid_psot", "blocks.1.hook_resid_post"), ("blocks.9.hook_mlp_out", "hook_mlp_out"),
                        ("blocks.*.hook_patern", "hook_pattern")):  # fmt: skip
        with pytest.raises(RequestError, match="there is no hook") as refused:
            dense.run_with_cache(IDS, ["hook_embed", wrong])
        assert near in str(refused.value) and "list_hooks" in str(refused.value)
        with pytest.raises(RequestError), dense.hooks([(wrong, print)]):
            pass
    with pytest.raises(RequestError, match="a pattern, a list of them or a function of a name, not NoneType"), dense.hooks([(None, print)]):
        pass


@pytest.mark.parametrize("ids,message", [
    (IDS[0], r"\(B, T\) int64, .*tokenizer.encode.* this is torch.int64 of shape \[9\]"), ([1, 2], "a list"), ("Once", "a str"),
    (None, "a NoneType"), (IDS.float(), "torch.float32"), (IDS + 211, "within 0..210; these go from"), (IDS - 300, "within 0..210"),
])  # fmt: skip
def test_ids_that_are_none_are_refused(dense, ids, message):
    for call in (lambda: dense.run_with_cache(ids), lambda: dense.run_with_hooks(ids, [])):
        with pytest.raises(RequestError, match=message):
            call()
    assert torch.equal(dense.run_with_hooks(IDS.int(), []), dense(IDS))


def test_an_embedding_model_says_where_its_activations_are(dense):
    model, _ = make_pair(TINY["qwen3"][1])
    model.lm_head = None
    for call in (lambda: model.run_with_cache(IDS), lambda: model.run_with_hooks(IDS, [])):
        with pytest.raises(RequestError, match=r"no logits: call model.model inside model.hooks"):
            call()
    expected, seen = dense.run_with_cache(IDS)[1], []
    with model.hooks([("ln_final.hook_out", lambda value, hook: seen.append(value))]):
        assert torch.equal(model.model(IDS), seen[0])
    assert torch.equal(seen[0], expected["ln_final.hook_out"])
    assert torch.equal(model.run_with_cache(IDS, [], stop_at_layer=-1)[0], expected["resid_post", 1])


@pytest.mark.parametrize(
    "wrong,message",
    [
        (lambda v: v[:, 1:], r"shape \[2, 8, 48\].*\[2, 9, 48\]"),
        (lambda v: v.double(), "dtype torch.float64.*torch.float32"),
        (lambda v: v.to("meta"), "device meta"),
        (lambda v: v.numpy(), "ndarray"),
        (lambda v: (v,), "tuple"),
    ],
)
@pytest.mark.parametrize("name", ["blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre"])
def test_a_function_that_returns_something_else_is_refused(dense, name, wrong, message):
    with pytest.raises(RequestError, match=message) as refused:
        dense.run_with_hooks(IDS, [(name, lambda value, hook: wrong(value))])
    assert name in str(refused.value)
    assert _clean(dense)


@pytest.mark.parametrize("name", ["attn.hook_pattern", "attn.hook_rot_q", "ln2.hook_scale", "attn.hook_result"])
def test_a_wrong_shape_inside_an_operation_is_refused(dense, name):
    with pytest.raises(RequestError, match="returned shape"):
        dense.run_with_hooks(IDS, [(f"blocks.1.{name}", lambda value, hook: value[..., :1, :])])
    assert _clean(dense)


# ------------------------------------------------------------------------------------------------- nothing stays behind


def _clean(model: nn.Module) -> bool:
    left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called]
    return not left and not hooks._sessions and not any(op.wrappers for op in backend.OPERATIONS.values())


@pytest.mark.parametrize("name", ["*hook_*"])
def test_hooks_go_when_the_block_ends_also_by_an_exception(moe, name):
    plain = moe(IDS)
    with moe.hooks([(name, lambda value, hook: None)]):
        assert not _clean(moe)
    assert _clean(moe)

    class Mine(Exception):
        pass

    def fail(value, hook):
        raise Mine

    for point in moe.list_hooks():
        with pytest.raises(Mine):
            moe.run_with_hooks(IDS, [(point, fail)])
        assert _clean(moe), point
    with pytest.raises(Mine), moe.hooks([(name, lambda value, hook: None)]):
        raise Mine
    assert _clean(moe) and torch.equal(moe(IDS), plain)


def test_a_failure_in_the_middle_does_not_disturb_the_next_forward(dense):
    """The block of hooks goes on; layer 0, whose operations nobody asked for, must not be taken for layer 1."""
    plain, calls = dense(IDS), []

    def fail_once(value, hook):
        calls.append(hook.name)
        if len(calls) == 1:
            raise ZeroDivisionError

    with dense.hooks([("blocks.1.attn.hook_rot_q", fail_once)]):
        with pytest.raises(ZeroDivisionError):
            dense(IDS)
        assert torch.equal(dense(IDS), plain)
    assert calls == ["blocks.1.attn.hook_rot_q"] * 2


def test_nested_hooks(dense):
    outer, inner = ("blocks.0.hook_mlp_out", lambda v, hook: v * 2), ("blocks.2.attn.hook_z", lambda v, hook: v + 1)
    both = dense.run_with_hooks(IDS, [outer, inner])
    only = dense.run_with_hooks(IDS, [outer])
    with dense.hooks([outer]):
        with dense.hooks([inner]):
            assert torch.equal(dense(IDS), both)
        assert torch.equal(dense(IDS), only)
        logits, acts = dense.run_with_cache(IDS, "blocks.0.hook_mlp_out")
    assert torch.equal(logits, only)
    # of two functions at one point the inner, later one sees what the outer made
    assert torch.equal(acts["mlp_out", 0], 2 * dense.run_with_cache(IDS, "blocks.0.hook_mlp_out")[1]["mlp_out", 0])
    with dense.hooks([("blocks.1.attn.hook_pattern", lambda v, hook: v * 2)]):
        _, acts = dense.run_with_cache(IDS, ["blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_z"])
    _, plain = dense.run_with_cache(IDS, "blocks.1.attn.hook_*")
    torch.testing.assert_close(acts["z", 1], 2 * plain["z", 1])
    assert torch.equal(acts["rot_k", 1], plain["rot_k", 1])
    assert _clean(dense)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3", "qwen3_5", "qwen4_exp"])
def test_a_block_inside_another_sees_its_edits(kind):
    """At every kind of point, wherever its value comes from; and of all others the inner block sees what it would in one list."""
    model, _ = make_pair(TINY[kind][1])
    _, plain = model.run_with_cache(IDS, "*hook_*")
    kinds = {(point.name.replace(f"blocks.{point.layer}", ""), point.place): name for name, point in points(model).items()}
    for name in (name for name in kinds.values() if points(model)[name].editable):
        together, before = {}, []
        expected = model.run_with_hooks(IDS, [(name, _edited), ("*hook_*", lambda v, hook, to=together: to.update({hook.name: v}))])
        with model.hooks([(name, _edited)]):
            logits, acts = model.run_with_cache(IDS, "*hook_*")
        assert torch.equal(acts[name], _edited(plain[name], points(model)[name])), name
        assert torch.equal(logits, expected) and all(torch.equal(acts[other], together[other]) for other in plain), name
        with model.hooks([(name, lambda value, hook, before=before: before.append(value))]):
            assert torch.equal(model.run_with_hooks(IDS, [(name, _edited)]), expected), name
        assert torch.equal(before[0], plain[name]), name
    assert _clean(model)


def test_blocks_that_end_in_another_order_leave_the_rest(dense):
    first, second = (dense.hooks([("blocks.1.attn.hook_pattern", lambda v, hook, x=x: v * x)]) for x in (2.0, 3.0))
    expected = dense.run_with_hooks(IDS, [("blocks.1.attn.hook_pattern", lambda v, hook: v * 3.0)])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(dense(IDS), expected)
    second.__exit__(None, None, None)
    assert _clean(dense)


def test_a_block_may_open_in_the_middle_of_a_pass(dense):
    """A function that runs the model itself, under a block of its own, is followed by the rest of the pass it is in."""
    names, seen = ["blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_pattern"], []

    def look(value, hook):
        if not seen:
            seen.append(hook.name)
            seen.append(dense.run_with_cache(IDS[:1, :4], "blocks.*.attn.hook_pattern")[1]["pattern", 2])
        seen.append(hook.name)

    plain = dense.run_with_hooks(IDS, [(names, lambda value, hook: None)])
    expected = dense.run_with_cache(IDS[:1, :4], "blocks.*.attn.hook_pattern")[1]["pattern", 2]
    assert torch.equal(dense.run_with_hooks(IDS, [(names, look)]), plain)
    assert torch.equal(next(x for x in seen if isinstance(x, torch.Tensor)), expected)
    assert [x for x in seen if isinstance(x, str)] == [names[0], *names, *names]
    assert _clean(dense)


def test_what_heads_write_and_what_reads_the_sum_are_edited_both(dense):
    both = [("model.layers.1.self_attn.o_proj", lambda v, hook: v + 1), ("blocks.1.attn.hook_result", lambda v, hook: v * 2)]
    _, plain = dense.run_with_cache(IDS, "blocks.1.hook_attn_out")
    with dense.hooks(both):
        _, acts = dense.run_with_cache(IDS, "blocks.1.hook_attn_out")
    torch.testing.assert_close(acts["attn_out", 1], 2 * plain["attn_out", 1] + 1)


def test_a_thread_with_the_same_model_is_left_alone(dense):
    """Two threads run one model at once, each under functions of its own, one inside the other's pass."""
    names, plain = ["blocks.*.attn.hook_pattern", "blocks.*.ln2.hook_scale", "blocks.*.hook_mlp_out"], dense(IDS)
    expected = dense.run_with_cache(IDS.flip(1), names)[1]
    threads, results = [], []

    @torch.no_grad()
    def run():
        results.append(dense(IDS))
        results.append(dense.run_with_cache(IDS.flip(1), names)[1])

    def edit(value, hook):
        if not threads:
            threads.append(threading.Thread(target=run))
            threads[0].start()
            threads[0].join(30)
        return value * 2

    edited = dense.run_with_hooks(IDS, [(names, edit)])
    assert torch.equal(results[0], plain) and all(torch.equal(results[1][name], expected[name]) for name in expected)
    assert torch.equal(edited, dense.run_with_hooks(IDS, [(names, lambda value, hook: value * 2)])) and _clean(dense)


def test_a_thread_with_another_model_is_left_alone(dense):
    """Wrapped operations are global: a model in another thread passes through them untouched."""
    other, _ = make_pair(TINY["qwen3_moe"][1], seed=3)
    plain, seen, results = other(IDS), [], []
    inside, done = threading.Event(), threading.Event()

    @torch.no_grad()
    def run():
        inside.wait(30)
        results.extend(other(IDS) for _ in range(3))
        done.set()

    def edit(value, hook):
        if not seen:
            inside.set()
            done.wait(30)  # the other thread runs while this one stands in the middle of layer 1
        seen.append(threading.get_ident())
        return value * 2

    thread = threading.Thread(target=run)
    thread.start()
    names = ["blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_pattern", "blocks.1.ln2.hook_scale"]
    edited = dense.run_with_hooks(IDS, [(names, edit)])
    thread.join()
    assert len(results) == 3 and all(torch.equal(r, plain) for r in results)
    assert len(seen) == 3 and set(seen) == {threading.get_ident()}
    assert torch.equal(edited, dense.run_with_hooks(IDS, [(names, edit)]))


def test_asking_for_a_pattern_leaves_the_fused_kernel_and_says_so(dense):
    with backend.use({"attention": "torch"}):
        fused = dense(IDS)
        with pytest.warns(UserWarning, match=r"layer 1 runs eagerly instead of by 'torch'"):
            logits, acts = dense.run_with_cache(IDS, "blocks.1.attn.hook_pattern")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dense.run_with_cache(IDS, "blocks.1.attn.hook_z")  # the fused kernel has that
        ran = backend.attention.resolve(torch.device("cpu"), torch.float32).name
    assert ran == "torch"
    torch.testing.assert_close(logits, fused, atol=1e-5, rtol=1e-5)
    _, eager = dense.run_with_cache(IDS, "blocks.1.attn.hook_pattern")
    torch.testing.assert_close(acts["pattern", 1], eager["pattern", 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["hook_resid_post", "hook_resid_mid", "hook_resid_pre", "ln2.hook_normalized"])
def test_gradients_flow_through_hooks(dense, name):
    """What an edit puts in takes part in the backward pass; what is captured is detached."""
    steer = torch.zeros(48, requires_grad=True)
    with torch.enable_grad():
        logits = dense.run_with_hooks(IDS, [(f"blocks.1.{name}", lambda value, hook: value + steer)])
        logits[0, -1, 7].backward()
        _, acts = dense.run_with_cache(IDS)
    assert not acts["resid_post", 1].requires_grad
    step = 1e-3 * torch.nn.functional.normalize(steer.grad, dim=0)
    up, down = (dense.run_with_hooks(IDS, [(f"blocks.1.{name}", lambda value, hook, s=s: value + s)])[0, -1, 7]
                for s in (step, -step))  # fmt: skip
    assert float((up - down) / 2e-3) == pytest.approx(float(steer.grad.norm()), rel=2e-2)


def test_sliding_window_patterns(dense):
    config = {**TINY["qwen3"][1], "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model, _ = make_pair(config)
    _, acts = model.run_with_cache(IDS, "*pattern")
    assert acts["pattern", 0][..., 8, 0].min() > 0 and acts["pattern", 1].tril(-4).abs().max() == 0
    assert points(model).keys() == points(dense).keys()


def test_threads_intercept_one_operation_at_once():
    """Each finds its own wrapper in every call between its `with` and its end, and none is left."""
    missed, x = [], torch.ones(2)

    def run():
        for _ in range(2000):
            calls = []
            with backend.intercept("swiglu", lambda run, *args, calls=calls: (calls.append(1), run(*args))[1]):
                backend.swiglu(x, x)
            missed.append(not calls)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert len(missed) == 8000 and not any(missed) and not backend.swiglu.wrappers


def test_a_warning_that_is_an_error_leaves_nothing(dense):
    with backend.use({"attention": "torch"}), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="runs eagerly"):
            dense.run_with_cache(IDS, "blocks.1.attn.hook_pattern")
    assert _clean(dense)


# ------------------------------------------------------------------------------------------------- found by a reader


@pytest.mark.parametrize("config", ALL)
def test_some_positions_of_every_point_that_has_them(config):
    model, _ = make_pair(config)
    whole, some, last = ({name: value for name, value in model.run_with_cache(IDS, "*hook_*", pos_slice=kept)[1].items()}
                         for kept in (None, slice(2, 5), -1))  # fmt: skip
    for name, point in points(model).items():
        if name not in whole:
            continue
        at = point.dims.find("T")
        assert torch.equal(some[name], whole[name] if at < 0 else whole[name].narrow(at, 2, 3)), name
        assert torch.equal(last[name], whole[name] if at < 0 else whole[name].narrow(at, IDS.shape[1] - 1, 1)), name


@pytest.mark.parametrize("kept", [9, -10, slice(20, 30), slice(None, None, -1), slice("a", None), [1], "1", 1.5])
def test_positions_that_there_are_not(dense, kept):
    with pytest.raises(RequestError, match="pos_slice is"):
        dense.run_with_cache(IDS, "hook_embed", pos_slice=kept)


def test_positions_of_a_module_by_its_path_are_refused(dense):
    with pytest.raises(RequestError, match=r"model\.layers\.0 is a module"):
        dense.run_with_cache(IDS, "model.layers.0", pos_slice=-1)


def test_logits_have_positions_in_generate_too():
    model, tokenizer = qr.load("tiny", dtype=torch.float32)

    def only(value, hook):
        assert value.dim() == len(hook.dims) == 3
        value[:, -1] = 0
        value[:, -1, 42] = 1

    with model.hooks([("hook_logits", only)]):
        assert qr.generate(model, tokenizer, "Once", max_tokens=3, temperature=0, ignore_eos=True)[0].token_ids == [42] * 3
        assert int(model(IDS)[0, -1].argmax()) == 42


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "qwen4_exp"])
def test_to_look_is_no_edit_with_gradients_nor_where_there_is_nan(name):
    model, _ = make_pair(TINY[name][1])
    with torch.enable_grad():
        model.requires_grad_(True)
        expected = model(IDS)
        seen = []
        looked = model.run_with_hooks(IDS, [("*hook_*", lambda value, hook: seen.append(hook.name))])
        assert torch.equal(looked, expected) and {"hook_embed", "hook_logits"} < set(seen)
        model.requires_grad_(False)
    with torch.no_grad():
        next(model.model.layers[0].parameters())[0] = float("nan")
    model.run_with_hooks(IDS, [("*hook_*", lambda value, hook: value)])


def test_layers_of_different_kinds_are_not_stacked():
    model, _ = make_pair(TINY["qwen3_5"][1])
    _, acts = model.run_with_cache(IDS, "*hook_q")
    with pytest.raises(RequestError, match="layers of different kinds"):
        acts.stack("q")
