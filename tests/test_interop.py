"""Other people's instruments on our modules, unadapted: captum's attributions and PyTorch's own hooks."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, casts_lifted, make_pair

import qwen_ref as qr

try:
    from captum.attr import LayerActivation, LayerIntegratedGradients
except ImportError:
    LayerIntegratedGradients = None

needs_captum = pytest.mark.skipif(LayerIntegratedGradients is None, reason="captum is not installed: extra `interop`")


def test_conftest_has_captum_in_ci():
    import os

    assert LayerIntegratedGradients is not None or not os.environ.get("CI"), "CI must have captum"


@pytest.fixture(scope="module", params=["tiny", "tiny-moe"])
def bundled(request):
    """Weights load frozen, as inference wants them; one call thaws them."""
    model, tokenizer = qr.load(request.param, dtype=torch.float64)
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little")])
    return model.requires_grad_(True), ids, tokenizer.encode(" girl")[0]


@needs_captum
def test_integrated_gradients_of_the_embedding_are_complete(bundled):
    """Sundararajan et al. 2017: attributions along the path from baseline to input sum to f(input) - f(baseline).

    What is left is the error of the quadrature: below 1 % of the difference, and falling as steps are added.
    """
    model, ids, target = bundled
    baseline = torch.full_like(ids, 7)

    def answer(ids):
        return model(ids)[:, -1, target]

    instrument = LayerIntegratedGradients(answer, model.model.embed_tokens)
    with torch.no_grad():
        difference = float(answer(ids) - answer(baseline))
    errors = []
    for steps in (16, 64):
        shares = instrument.attribute(ids, baselines=baseline, n_steps=steps, method="gausslegendre")
        assert shares.shape == (1, ids.shape[1], model.config.hidden_size)
        errors.append(abs(float(shares.sum()) - difference))
        assert shares.isfinite().all() and shares.abs().sum(-1).min() > 0
    if not model.config.num_experts:  # where the chosen experts change the function jumps, and no gradient carries a jump
        assert errors[-1] < 0.01 * abs(difference) and errors[-1] < errors[0]


@needs_captum
def test_layer_activation_is_what_our_hooks_capture(bundled):
    model, ids, _ = bundled
    shown = LayerActivation(model, model.model.layers[2].mlp).attribute(ids)
    _, acts = model.run_with_cache(ids, "blocks.2.hook_mlp_out")
    assert torch.equal(shown, acts["mlp_out", 2])


def test_plain_pytorch_hooks_see_and_edit_plain_tensors(bundled):
    model, ids, _ = bundled
    _, acts = model.run_with_cache(ids, ["blocks.1.hook_attn_out", "blocks.1.hook_resid_post"])
    seen = {}
    block = model.model.layers[1]
    handles = [m.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
               for name, m in (("block", block), ("attn", block.self_attn))]  # fmt: skip
    plain = model(ids)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["block"], acts["resid_post", 1]) and torch.equal(seen["attn"], acts["attn_out", 1])
    handle = block.self_attn.register_forward_hook(lambda module, args, output: output * 0)
    silent = model(ids)
    handle.remove()
    assert torch.equal(silent, model.run_with_hooks(ids, [("blocks.1.hook_attn_out", lambda value, hook: value * 0)]))
    assert not torch.equal(silent, plain) and torch.equal(model(ids), plain)


def test_both_kinds_of_hooks_at_once(bundled):
    model, ids, _ = bundled
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model.run_with_hooks(ids, [("blocks.1.ln2.hook_out", lambda value, hook: value * 0)])
    finally:
        handle.remove()
    assert seen[0].abs().max() == 0  # a feed-forward without bias makes nothing of nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_can_be_thawed_and_trained(dtype):
    """Weights may lie in memory that came from a file: a gradient and a step must not care."""
    model, _ = qr.load("tiny", dtype=dtype)
    ids = torch.tensor([[5, 9, 2, 11, 7]])
    model.requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.no_grad():
        after = torch.nn.functional.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:])
    assert float(after) < float(loss.detach())
    again, _ = qr.load("tiny", dtype=dtype)
    assert not torch.equal(again.lm_head.weight, model.lm_head.weight)  # the step changed this model, not the file


@pytest.mark.parametrize("kind", TINY)
def test_gradients_flow_through_a_cache(kind):
    """A first pass that fills a cache has the gradients of one without: the cache writes into no view autograd refuses."""
    model = make_pair(TINY[kind][1], torch.float64)[0].requires_grad_(True)
    ids = torch.randint(0, 211, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for cache in (None, model.make_cache()):
        model.zero_grad()
        model(ids, cache=cache)[..., 3].sum().backward()
        found.append([(name, p.grad) for name, p in model.named_parameters()])
    for (name, plain), (_, cached) in zip(*found, strict=True):
        assert (plain is None) == (cached is None), name
        if plain is not None:
            assert float((cached - plain).abs().max() / plain.abs().max().clamp_min(1e-12)) < 1e-10, name


@pytest.mark.parametrize("kind", TINY)
def test_gradients_are_those_of_transformers(kind):
    ours, theirs = make_pair(TINY[kind][1], torch.float64)
    ids = torch.randint(0, 211, (2, 9), generator=torch.Generator().manual_seed(1))
    ours.requires_grad_(True)
    theirs.requires_grad_(True)
    ours(ids)[..., 3].sum().backward()
    with casts_lifted(theirs):
        theirs(ids).logits[..., 3].sum().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if expected[name].grad is None:  # what only chooses has none
            assert p.grad is None and ".indexer." in name
            continue
        scale = expected[name].grad.abs().max().clamp_min(1e-12)
        assert float((p.grad - expected[name].grad).abs().max() / scale) < 1e-10, name
