"""Fused models: transformers' logits from the joined steps, over caches, batches, formats, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, casts_lifted, make_pair
from quantised import FORMATS, checkpoint
from test_parity import IDS, VARIANTS

import qwen_ref as qr
from qwen_ref import backend
from qwen_ref.cpp import operations as cpp
from qwen_ref.errors import QwenRefError
from qwen_ref.fuse import Together, fuse
from qwen_ref.layers import Linear
from qwen_ref.loading import load_model
from qwen_ref.models import qwen2

KNOWN = [name for name in VARIANTS if name.split()[0] in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")]
COMPILED = cpp.supports_packed(torch.device("cpu"), torch.bfloat16)


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).abs().max() / exact.double().abs().max())


def plain(name: str, dtype: torch.dtype = torch.float32):
    return make_pair(VARIANTS[name], dtype)[0]


def read(model, pieces, positions=None):
    """The logits of some tokens, read piece by piece."""
    cache, out = model.make_cache(), []
    with torch.inference_mode():
        for piece in pieces:
            out.append(model(piece, positions, cache))
            positions = None
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("variant", KNOWN)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-10)])
def test_logits_are_transformers(variant, dtype, bound):
    """To the bounds of the parity suite, with biases, windows, YaRN and tied heads among its variants."""
    ours, theirs = make_pair(VARIANTS[variant], dtype)
    with backend.use("eager"), casts_lifted(theirs):
        assert off(ours.fuse()(IDS), theirs(IDS).logits) <= bound


@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"])
def test_bf16_loses_no_more_than_the_model(name):
    ours, exact = plain(name, torch.bfloat16), plain(name)
    for p, q in zip(exact.parameters(), ours.parameters(), strict=True):
        p.copy_(q)
    with torch.inference_mode(), backend.use("eager"):
        truth, apart = exact(IDS), ours(IDS).float()
        assert (ours.fuse()(IDS).float() - truth).norm() <= 1.25 * (apart - truth).norm()


@pytest.mark.parametrize("variant", ["qwen2 sliding", "qwen3", "qwen3_moe sliding"])
def test_cached_is_whole_at_every_split(variant):
    ours = plain(variant)
    whole, fast = ours(IDS), ours.fuse()
    for split in range(1, 23):
        assert off(read(fast, IDS.split([split, 23 - split], dim=1)), whole) < 5e-6, split
    assert off(read(fast, IDS.split(1, dim=1)), whole) < 5e-6


@pytest.mark.parametrize("variant", ["qwen2 sliding", "qwen3"])
def test_left_padding_and_the_model_reads_on_in_the_same_cache(variant):
    ours = plain(variant)
    fast, positions = ours.fuse(), torch.arange(23).repeat(2, 1)
    positions[1] = (positions[1] - 9).clamp_min(-1)
    apart = ours(IDS, positions)
    together = read(fast, [IDS[:, :20], IDS[:, 20:21], IDS[:, 21:]], positions[:, :20])
    for row, pad in ((0, 0), (1, 9)):
        assert off(together[row, pad:], apart[row, pad:]) < 5e-6
    cache = fast.make_cache()
    fast(IDS[:, :11], positions[:, :11], cache)
    ours(IDS[:, 11:15], None, cache)  # either may write into it
    cache.select(torch.tensor([1]))
    assert off(fast(IDS[1:, 15:], None, cache), apart[1:, 15:]) < 5e-6


def test_a_cache_outgrows_its_buffer_and_is_cut_back():
    ours = plain("qwen3")
    ids, fast = torch.randint(0, 211, (2, 150), generator=torch.Generator().manual_seed(3)), ours.fuse()
    cache = fast.make_cache()
    fast(ids[:, :60], None, cache)
    fast(torch.flip(ids[:, 60:80], [1]), None, cache)
    cache.truncate(60)
    assert off(fast(ids[:, 60:], None, cache), ours(ids)[:, 60:]) < 5e-6


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_generate_says_the_same(name, quantize):
    model, tokenizer = qr.load(name, dtype=torch.float32, quantize=quantize)
    prompts = ["Once upon a time", "The little dog was very"]
    apart = qr.generate(model, tokenizer, prompts, max_tokens=24, temperature=0)
    together = qr.generate(model.fuse(), tokenizer, prompts, max_tokens=24, temperature=0)
    assert [r.token_ids for r in together] == [r.token_ids for r in apart]


# ---------------------------------------------------------------- memory


def test_the_model_goes_on_and_nothing_is_held_twice():
    ours = plain("qwen2")  # with biases
    before, fast = ours(IDS), ours.fuse()
    assert torch.equal(ours(IDS), before)
    for block, fused in zip(ours.model.layers, fast.model.layers, strict=True):
        for together, parts in ((fused.attention.qkv_proj, [block.self_attn.get_submodule(f"{p}_proj") for p in "qkv"]),
                                (fused.mlp.gate_up_proj, [block.mlp.gate_proj, block.mlp.up_proj])):  # fmt: skip
            storage = together.whole.weight.untyped_storage()
            assert storage.nbytes() == sum(p.weight.nbytes for p in parts)
            assert all(p.weight.untyped_storage().data_ptr() == storage.data_ptr() for p in parts)
            if parts[0].bias is not None:
                assert {p.bias.untyped_storage().data_ptr() for p in parts} == {together.whole.bias.untyped_storage().data_ptr()}
    assert fast.num_parameters() == ours.num_parameters()


# Act-order shuffles each matrix's columns in its own way; one scale for a whole matrix, or FP8 blocks that end elsewhere than
# it, would need other scales when joined.
APART = {"gptq-int4-act-order", "gptq-int8-act-order", "fp8", "fp8-tensor", "compressed-fp8-tensor", "modelopt-fp8",
         "compressed-nvfp4", "modelopt-nvfp4"}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(tmp_path, format):
    """The same products, whether a format's matrices can be joined or have to stay apart; the model has rows of the joined."""
    checkpoint(tmp_path, "qwen2", format)
    model = load_model(tmp_path, dtype=torch.float32)
    with torch.inference_mode(), backend.use("eager"):
        before = model(IDS)
        weights = {name: w.clone() for name, w in model.named_weights()}
        fast = model.fuse()
        assert off(fast(IDS), before) < 2e-6 and torch.equal(model(IDS), before)
    assert all(torch.equal(w, weights[name]) for name, w in model.named_weights())
    together = [module for module in fast.modules() if isinstance(module, Together)]
    assert all(t.whole is not None for t in together) == (format not in APART)
    own = {t.untyped_storage().data_ptr() for _, m in model.packed_modules() for t in m.packed_tensors}
    assert {t.untyped_storage().data_ptr() for m in together for p in (m.whole or [], *m.parts) for t in getattr(p, 'packed_tensors', [])} <= own


def test_what_differs_stays_apart():
    bare, biased, wide = Linear(8, 3, bias=False), Linear(8, 5, bias=True), Linear(8, 4, bias=False).double()
    assert Together(bare, wide).whole is None
    together, x = Together(bare, biased), torch.randn(4, 8)
    assert together.whole is None
    assert all(torch.equal(y, p(x)) for y, p in zip(together(x), (bare, biased), strict=True))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp"])
def test_other_generations_are_refused(name):
    with pytest.raises(QwenRefError, match=f"{TINY[name][0].__name__.rpartition('.')[2]} cannot be fused"):
        make_pair(TINY[name][1])[0].fuse()


def test_dual_chunk_attention_is_refused():
    config = {**qwen2.TINY, "dual_chunk_attention_config": {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 64}}
    with pytest.raises(QwenRefError, match="cannot be fused"):
        fuse(qwen2.Model(qwen2.Config.from_json(config)))


def test_what_only_the_model_can_do_is_refused(tmp_path):
    fast = plain("qwen3").fuse()
    for call, message in ((lambda: fast.save(tmp_path / "x"), "save the model it was made of"),
                          (lambda: fast.to(torch.float64), "then fuse it again"),
                          (fast.list_hooks, "hook the one it was made of"),
                          (lambda: fast.run_with_cache(IDS), "hook the one it was made of"),
                          (fast.fuse, "cannot be fused")):  # fmt: skip
        with pytest.raises(QwenRefError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_hooks_of_the_model_still_work():
    ours = plain("qwen3")
    before, acts = ours.run_with_cache(IDS, "blocks.1.attn.hook_q")
    ours.fuse()
    after, again = ours.run_with_cache(IDS, "blocks.1.attn.hook_q")
    assert torch.equal(before, after) and torch.equal(acts["q", 1], again["q", 1])


def test_it_runs_without_gradients():
    fast = plain("qwen3").requires_grad_(True).fuse()
    cache = fast.make_cache()
    for call in (fast, fast.model):
        assert not call(IDS).requires_grad and not call(IDS[:, :3], None, cache).requires_grad


# ---------------------------------------------------------------- faster implementations


@pytest.mark.skipif(COMPILED is not None, reason=f"no compiled kernel: {COMPILED}")
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_compiled_operations_round_where_the_formulas_do(name):
    fast, pieces = plain(name, torch.bfloat16).fuse(), IDS.split([20, 1, 1, 1], dim=1)
    with backend.use("eager"):
        formulas = read(fast, pieces)
        with backend.use({op: "cpp" for op in ("add_rms_norm", "norm_rope_write", "swiglu", "rms_norm")}, strict=True):
            compiled = read(fast, pieces)
    assert (compiled.float() - formulas.float()).norm() < 1e-2 * formulas.float().norm()  # a rounding of bf16 here or there
