"""The same weights in transformers and here: every module's output, in fp32, fp64 and bf16, for every model_type."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import TINY, casts_lifted, make_pair

from qwen_ref import backend, ops
from qwen_ref.verify import capture

YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
VARIANTS = {
    **{name: config for name, (_, config) in TINY.items()},
    "qwen2 tied": {**TINY["qwen2"][1], "tie_word_embeddings": True},
    "qwen2 sliding": {**TINY["qwen2"][1], **SLIDING},
    "qwen2 yarn": {**TINY["qwen2"][1], **YARN},
    "qwen2_moe sliding": {**TINY["qwen2_moe"][1], **SLIDING},
    "qwen2_moe renormalised": {**TINY["qwen2_moe"][1], "norm_topk_prob": True, "decoder_sparse_step": 2},
    "qwen3 tied": {**TINY["qwen3"][1], "tie_word_embeddings": True},
    "qwen3 biased": {**TINY["qwen3"][1], "attention_bias": True},
    "qwen3 sliding": {**TINY["qwen3"][1], **SLIDING},
    "qwen3 yarn": {**TINY["qwen3"][1], **YARN},
    "qwen3 rope_parameters": {
        **{k: v for k, v in TINY["qwen3"][1].items() if k != "rope_theta"},
        "rope_parameters": {"rope_theta": 5e5, **YARN["rope_scaling"]},
    },
    "qwen3_next tied": {**TINY["qwen3_next"][1], "tie_word_embeddings": True, "norm_topk_prob": False},
    "qwen3_5 yarn": {
        **TINY["qwen3_5"][1],
        "rope_parameters": {**TINY["qwen3_5"][1]["rope_parameters"], **YARN["rope_scaling"]},
    },
    "qwen3_5 biased": {**TINY["qwen3_5"][1], "attention_bias": True},
    "qwen3_5_moe other order": {
        **TINY["qwen3_5_moe"][1],
        "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention", "linear_attention"],
    },
    "qwen3_moe sliding": {**TINY["qwen3_moe"][1], **SLIDING},
    "qwen3_moe not renormalised": {**TINY["qwen3_moe"][1], "norm_topk_prob": False},
}
ids_of = torch.Generator().manual_seed(1)
IDS = torch.randint(0, 211, (2, 23), generator=ids_of)


def compare(ours, theirs, bound: float) -> int:
    with backend.use("eager"):
        mine = capture(ours, IDS)
    reference = capture(theirs, IDS)
    missing = [n for n, m in ours.named_modules() if next(m.parameters(recurse=False), None) is not None and n not in reference
               and not n.endswith(".conv1d")]  # transformers reads its weight and never calls it; test_verify compares what it makes
    assert not missing, f"never compared: {missing}"
    # transformers' convolution of the n-grams is before silu, and its hyper-connections return the streams again.
    shared = [n for n in mine if n in reference and not n.endswith(".conv1d") and "hyper_connection[" not in n]
    for name in shared:
        if name.endswith("indexer.k_layernorm"):  # transformers calls it for every query: what is left is the very last
            mine[name] = mine[name][-1]
        b = reference[name].double()
        a = mine[name].double().expand_as(b).flatten() if "rotary" in name else mine[name].double().flatten()  # (1 or B, T, R)
        b = b.flatten()
        assert a.shape == b.shape, name
        error = float((a - b).abs().max() / b.abs().max())
        assert error <= bound, f"{name}: max-abs error {error:.2e} of its scale, allowed {bound:.0e}"
    return len(shared)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32(variant):
    ours, theirs = make_pair(VARIANTS[variant])
    # A few fp32 roundings of 6e-8. The delta rule sums in another order, token by token here and in chunks there, and the
    # norm after it divides by what may be small; test_fp64 shows that there is nothing else.
    count = compare(ours, theirs, 1e-4 if "linear_attention" in ours.config.layer_types else 2e-6)
    assert count > 10 * 3  # every sub-layer of three layers took part


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp64(variant):
    ours, theirs = make_pair(VARIANTS[variant], torch.float64)
    with casts_lifted(theirs):
        compare(ours, theirs, 1e-10)


@pytest.mark.parametrize("name", TINY)
def test_bf16_loses_no_more_than_transformers(name):
    """Ours against fp32 may lose 1.25 times what transformers loses in bf16. Same order of roundings: equal here."""
    ours, theirs = make_pair(TINY[name][1], torch.bfloat16)
    exact, _ = make_pair(TINY[name][1])
    with torch.no_grad(), backend.use("eager"):
        truth = exact.to(torch.float32)
        for p, q in zip(truth.parameters(), ours.parameters(), strict=True):
            p.copy_(q)  # the fp32 run of the rounded weights
        truth, mine, reference = truth(IDS), ours(IDS).float(), theirs(IDS).logits.float()
    assert (mine - truth).norm() <= 1.25 * (reference - truth).norm()
    if "linear_attention" not in ours.config.layer_types:  # where sums have another order, a tie may fall the other way
        assert torch.equal(mine.argmax(-1), reference.argmax(-1))
    unlike = mine.argmax(-1) != reference.argmax(-1)
    best = truth.topk(2).values  # (B, T, 2)
    assert (best[unlike][:, 0] - best[unlike][:, 1] <= 2 * (reference - truth).abs().amax(-1)[unlike]).all()


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "qwen3_next"])
def test_the_same_experts_are_chosen(name):
    ours, theirs = make_pair(TINY[name][1])
    chosen = []
    hook = theirs.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, out: chosen.append(out))
    logits = capture(ours, IDS)["model.layers.0.mlp.gate"]
    theirs(IDS)
    hook.remove()
    _, weights, experts = chosen[0]
    config = ours.config
    mine, my_experts = ops.router_topk(logits, config.num_experts_per_tok, config.norm_topk_prob)
    assert torch.equal(my_experts, experts)
    torch.testing.assert_close(mine, weights, rtol=1e-5, atol=1e-7)
    assert len(experts.unique()) == config.num_experts  # the test reaches them all


@pytest.mark.parametrize("variant", ["qwen2", "qwen2_moe sliding", "qwen3", "qwen3 sliding", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen4_exp"])
def test_left_padding_matches_transformers(variant):
    hybrid = "linear_num_key_heads" in VARIANTS[variant]  # in fp64: see test_fp32
    ours, theirs = make_pair(VARIANTS[variant], torch.float64 if hybrid else torch.float32)
    positions = torch.arange(23).repeat(2, 1)
    positions[1] -= 9
    mask = (positions >= 0).long()
    with torch.no_grad(), casts_lifted(theirs) if hybrid else nullcontext():
        mine = ours(IDS, positions.clamp_min(-1))
        reference = theirs(IDS, attention_mask=mask, position_ids=positions.clamp_min(0)).logits
    close = {"rtol": 1e-9, "atol": 1e-9} if hybrid else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(mine[mask.bool()], reference[mask.bool()], **close)
    assert torch.isfinite(mine).all()


def test_a_planted_fault_is_seen():
    """The comparison itself can fail: half a percent on one weight of one norm."""
    ours, theirs = make_pair(TINY["qwen3"][1])
    ours.model.layers[1].self_attn.q_norm.weight[3] *= 1.005
    with pytest.raises(AssertionError, match=r"model\.layers\.1\.self_attn\.q_norm"):
        compare(ours, theirs, 2e-6)
