"""Fused models: transformers' logits from the joined steps, over caches, batches, formats, and what they refuse."""

from __future__ import annotations

import copy
import gc
import mmap
import subprocess
import sys

import pytest
import torch
from conftest import TINY, casts_lifted, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import FORMATS, checkpoint
from test_mtp import HYBRIDS, with_draft_layer
from test_parity import IDS, VARIANTS

import qwen_ref as qr
from qwen_ref import backend, memory
from qwen_ref.cache import RecurrentCache
from qwen_ref.cpp import library
from qwen_ref.cpp import operations as cpp
from qwen_ref.errors import NumericsError, QwenRefError
from qwen_ref.fuse import Together, fuse
from qwen_ref.hook_points import points
from qwen_ref.layers import Linear
from qwen_ref.loading import load_model, locate
from qwen_ref.models import qwen1, qwen2

KNOWN = [name for name in VARIANTS if name.split()[0] not in ("qwen1", "qwen4_exp")]
HYBRID = ("qwen3_next", "qwen3_5", "qwen3_5_moe")  # whose norm after the delta rule scales up the rounding of what may be small
COMPILED = cpp.supports_rounding(torch.device("cpu"), torch.bfloat16)
compiled = pytest.mark.skipif(cpp.supports(torch.device("cpu"), torch.float32) is not None,
                              reason=f"no compiled operations: {cpp.supports(torch.device('cpu'), torch.float32)}")  # fmt: skip


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
    if variant.startswith(HYBRID) and dtype == torch.float32:
        bound = 1e-4
    with backend.use("eager"), casts_lifted(theirs):
        assert off(ours.fuse()(IDS), theirs(IDS).logits) <= bound


@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", *HYBRID])
def test_bf16_loses_no_more_than_the_model(name):
    ours, exact = plain(name, torch.bfloat16), plain(name)
    for p, q in zip(exact.parameters(), ours.parameters(), strict=True):
        p.copy_(q)
    with torch.inference_mode(), backend.use("eager"):
        truth, apart = exact(IDS), ours(IDS).float()
        for pieces in (IDS.split(23, dim=1), IDS.split([3, *[1] * 20], dim=1)):
            assert (read(ours.fuse(), pieces).float() - truth).norm() <= 1.25 * (apart - truth).norm()


@pytest.mark.parametrize("variant", ["qwen2 sliding", "qwen3", "qwen3_moe sliding", "qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_cached_is_whole_at_every_split(variant):
    ours = plain(variant, torch.float64)
    whole, fast = ours(IDS), ours.fuse()
    for split in range(1, 23):
        assert off(read(fast, IDS.split([split, 23 - split], dim=1)), whole) < 1e-10, split
    assert off(read(fast, IDS.split(1, dim=1)), whole) < 1e-10


@pytest.mark.parametrize("variant", ["qwen2 sliding", "qwen3", "qwen3_next", "qwen3_5"])
def test_left_padding_and_the_model_reads_on_in_the_same_cache(variant):
    ours = plain(variant, torch.float64)
    fast, positions = ours.fuse(), torch.arange(23).repeat(2, 1)
    positions[1] = (positions[1] - 9).clamp_min(-1)
    apart = ours(IDS, positions)
    together = read(fast, [IDS[:, :20], IDS[:, 20:21], IDS[:, 21:]], positions[:, :20])
    for row, pad in ((0, 0), (1, 9)):
        assert off(together[row, pad:], apart[row, pad:]) < 1e-10
    cache, out = fast.make_cache(), []
    for t in range(23):  # tokens of one row while the other has padding
        out.append(fast(IDS[:, t : t + 1], positions[:, t : t + 1], cache))
    assert off(torch.cat(out, dim=1)[1, 9:], apart[1, 9:]) < 1e-10
    cache = fast.make_cache()
    fast(IDS[:, :11], positions[:, :11], cache)
    ours(IDS[:, 11:15], None, cache)  # either may write into it
    fast(IDS[:, 15:16], None, cache)
    cache.select(torch.tensor([1]))
    fast(IDS[1:, 16:17], None, cache)
    assert off(fast(IDS[1:, 17:], None, cache), apart[1:, 17:]) < 1e-10


def test_a_cache_outgrows_its_buffer_and_is_cut_back():
    ours = plain("qwen3")
    ids, fast = torch.randint(0, 211, (2, 150), generator=torch.Generator().manual_seed(3)), ours.fuse()
    cache = fast.make_cache()
    fast(ids[:, :60], None, cache)
    fast(torch.flip(ids[:, 60:80], [1]), None, cache)
    cache.truncate(60)
    assert off(fast(ids[:, 60:], None, cache), ours(ids)[:, 60:]) < 5e-6


@pytest.mark.parametrize("name", ["tiny", "tiny-moe", "tiny-hybrid"])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_generate_says_the_same(name, quantize):
    model, tokenizer = qr.load(name, dtype=torch.float32, quantize=quantize)
    prompts = ["Once upon a time", "The little dog was very"]
    apart = qr.generate(model, tokenizer, prompts, max_tokens=24, temperature=0)
    together = qr.generate(model.fuse(), tokenizer, prompts, max_tokens=24, temperature=0)
    assert [r.token_ids for r in together] == [r.token_ids for r in apart]


@pytest.mark.parametrize("choice", ["eager", "cpp"])
def test_a_fused_hybrid_speculates_and_takes_turns(choice):
    """Its draft layer is the model's. Turns come back to marked states, which steps in between must not have written to."""
    model, tokenizer = qr.load("tiny-hybrid", dtype=torch.float32)
    fast, asked = model.fuse(), {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    said = qr.generate(model, tokenizer, "Once upon a time", **asked)[0]
    with backend.use({"gated_delta_step": choice, "sigmoid_gate": choice} if choice == "eager" else choice):
        guessed = qr.generate(fast, tokenizer, "Once upon a time", speculate=2, **asked)[0]
        assert guessed.token_ids == said.token_ids and guessed.usage.accepted_tokens > 0
        session, apart = qr.Session(fast), qr.Session(model)
        story = "Tim had a ball. He liked to play with it in the park. " * 6
        for prompt, more in ((story, {}), (story + "Lily", {}), (story, {"speculate": 2}), (story + "Tom", {})):
            turn = qr.generate(fast, tokenizer, prompt, session=session, **asked, **more)[0]
            assert turn.token_ids == qr.generate(model, tokenizer, prompt, session=apart, **asked)[0].token_ids
        assert turn.usage.cached_tokens > 50


@pytest.mark.parametrize("variant", HYBRIDS)
@pytest.mark.parametrize("choice", ["eager", pytest.param("cpp", marks=compiled)])
def test_the_draft_layer_is_fused_too(variant, choice):
    """Several entries at once, then one by one from its own states, some of them taken back: as the model's own, which goes on."""
    ours, _ = with_draft_layer(variant)
    fast = ours.fuse()
    hidden, ids = torch.randn(1, 30, ours.config.hidden_size), torch.randint(0, 211, (1, 30))
    with torch.inference_mode(), backend.use(choice):
        caches, recorded = (fast.make_draft_cache(), ours.make_draft_cache()), 0
        for count, kept in ((9, 9), *[(2, 1), (1, 1), (3, 3)] * 4):
            at, known = caches[0].length, len(caches[0].steps)
            here = slice(at, at + count)
            mine, theirs = (m.draft(hidden[:, here], ids[:, here], cache=c) for m, c in zip((fast, ours), caches, strict=True))
            assert off(mine, theirs) < 2e-5
            for cache in caches:
                cache.truncate(at + kept)
            recorded += len(caches[0].steps) - known
        assert recorded == (3 if choice == "cpp" else 0) and all(step.tape.whole for step in caches[0].steps)
        assert caches[0].length == caches[1].length == 29
    with ours.mtp.norm.register_forward_hook(lambda *_: None) and pytest.raises(QwenRefError, match="run that model itself"):
        fast.draft(hidden[:, :1], ids[:, :1])


# ---------------------------------------------------------------- memory


def test_the_model_goes_on_and_nothing_is_held_twice():
    ours = plain("qwen2")  # with biases
    before, fast = ours(IDS), ours.fuse()
    assert torch.equal(ours(IDS), before)
    for block, fused in zip(ours.model.layers, fast.model.layers, strict=True):
        for together, parts in ((fused.mixer.qkv_proj, [block.self_attn.get_submodule(f"{p}_proj") for p in "qkv"]),
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
         "compressed-nvfp4", "modelopt-nvfp4", "fp8-tensor-autofp8", "compressed-int4-tensor"}  # fmt: skip


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


def test_other_generations_are_refused():
    for model in (make_pair(TINY["qwen4_exp"][1])[0], qwen1.Model(qwen1.Config.from_json(qwen1.TINY))):
        with pytest.raises(QwenRefError, match=f"{type(model).__module__.rpartition('.')[2]} cannot be fused"):
            model.fuse()


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


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_a_fused_pass_does_not_pass_by_a_hook_in_silence(name):
    """Points on modules that it has not are refused, also on the way to the draft layer; those that it shares are reached."""
    ours, seen = plain(name), []
    fast = ours.fuse()
    with ours.hooks([("blocks.2.hook_attn_out", lambda x, hook: seen.append(hook))]):
        for run in (fast, fast.model):
            with pytest.raises(QwenRefError, match="run that model itself"):
                run(IDS)
        ours(IDS)
    assert len(seen) == 1
    with ours.hooks([("hook_embed", lambda x, hook: seen.append(hook))]):
        fast(IDS)
    assert len(seen) == 2 and off(fast(IDS), ours(IDS)) < 1e-4


@pytest.mark.parametrize("name", ["tiny", "tiny-moe", "tiny-hybrid"])
def test_every_point_is_reached_or_refused(name):
    """Of block 0, whose first norm is called, and of every kind of the others: what is edited there has the same effect as in
    the model, on a prompt and on the token after it, or the pass says that it has not the place."""
    model, tokenizer = qr.load(name, dtype=torch.float32)
    ids, fast = torch.tensor([tokenizer.encode("Once upon a time, there")]), model.fuse()
    pieces = ids.split([ids.shape[1] - 1, 1], dim=1)
    plain, seen, refused = read(model, pieces), [], set()
    kinds = {(point.layer == 0, point.name.replace(f"blocks.{point.layer}", ""), point.place): point
             for point in points(model).values()}

    def edit(x, hook):
        seen.append(hook.name)
        return None if not hook.editable else (x + 1) % 7 if hook.short == "topk_idx" else x * 0.5 + 0.1

    for point in kinds.values():
        with backend.use("eager"), model.hooks([(point.name, edit)]):
            expected, count = read(model, pieces), len(seen)
            try:
                got = read(fast, pieces)
            except QwenRefError as error:
                refused.add(point.name)
                assert "run that model itself" in str(error)
            else:
                assert off(got, expected) < 1e-4 and len(seen) == 2 * count, point.name
                assert not point.editable or off(expected, plain) > 1e-4 or point.short == "state", point.name
        seen.clear()
    norms = {f"blocks.{i}.{norm}.hook_{what}" for i, norm in ((1, "ln1"), (0, "ln2")) for what in ("scale", "normalized", "out")}
    assert norms & {point.name for point in kinds.values()} <= refused and "ln_final.hook_out" in refused
    assert not refused & {"hook_embed", "blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_out", "hook_logits"}


@pytest.mark.parametrize("point", ["hook_attn_out", "attn.hook_state", "attn.hook_beta"])
def test_points_inside_a_gated_delta_net_are_reached_by_every_token(point):
    """Also where one operation has taken the place of what they are in; what is edited there, changes what follows."""
    ours, seen = plain("qwen3_5", torch.float64), []
    fast, pieces = ours.fuse(), IDS.split([9, *[1] * 14], dim=1)

    def halve(x, hook):
        seen.append(x.shape[1])
        return x / 2

    with ours.hooks([(f"blocks.1.{point}", halve)]):
        edited, count = read(ours, pieces), len(seen)
        assert count and off(read(fast, pieces), edited) < 1e-10 and len(seen) == 2 * count
    assert off(edited, ours(IDS)) > 1e-6 and off(read(fast, pieces), ours(IDS)) < 1e-10


@compiled
def test_a_step_that_is_interrupted_is_not_come_back_to(monkeypatch):
    """Ctrl-C when the states are written and not all layers have said so: a session goes on from where it knows them."""
    model, tokenizer = qr.load("tiny-hybrid", dtype=torch.float32)
    fast, asked = model.fuse(), {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    prompt, whole = "Tim and the dog saw a big red ball in the park. " * 6, RecurrentCache.follow
    expected = [qr.generate(model, tokenizer, text, **asked)[0].token_ids for text in (prompt, prompt + "Then")]
    with backend.use("cpp"):
        for count in (1, 4, 7, 20):
            session, calls = qr.Session(fast), []

            def interrupt(self, states, calls=calls, count=count):
                calls.append(1)
                if len(calls) == count:
                    raise KeyboardInterrupt
                whole(self, states)

            monkeypatch.setattr(RecurrentCache, "follow", interrupt)
            with pytest.raises(KeyboardInterrupt):
                qr.generate(fast, tokenizer, prompt, session=session, **asked)
            monkeypatch.undo()
            for text, said in zip((prompt, prompt + "Then"), expected, strict=True):
                turn = qr.generate(fast, tokenizer, text, session=session, **asked)[0]
                assert turn.token_ids == said and turn.usage.cached_tokens > 0, count


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


# ---------------------------------------------------------------- recorded steps

# cpp's attention takes heads of multiples of eight.
RECORDABLE = {name: {**VARIANTS[name], **({"head_dim": 24} if "qwen3" in name else {})}
              for name in ("qwen2", "qwen2 yarn", "qwen2_moe", "qwen3", "qwen3 tied", "qwen3_moe", "qwen3_next", "qwen3_5",
                           "qwen3_5 biased", "qwen3_5_moe")}  # fmt: skip


def recordable(name: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0):
    return make_pair(RECORDABLE[name], dtype, seed)[0]


@pytest.fixture
def in_cpp():
    with backend.use("cpp"), torch.inference_mode():
        yield


def is_recorded(cache) -> bool:
    return bool(cache.steps) and cache.steps[-1].tape.whole


@compiled
@pytest.mark.parametrize("variant", RECORDABLE)
def test_recorded_steps_are_transformers(in_cpp, variant):
    """Token by token behind a prompt, until the cache has outgrown its buffer twice."""
    ours, theirs = make_pair(RECORDABLE[variant], torch.float32)
    ids = torch.randint(0, 211, (2, 140), generator=torch.Generator().manual_seed(3))
    fast = ours.fuse()
    cache, out = fast.make_cache(), []
    for piece in ids.split([9, *[1] * 131], dim=1):
        out.append(fast(piece, None, cache))
        assert is_recorded(cache) == (cache.length > 9) and len(cache.steps) <= 1  # none keeps memory that was outgrown
    with casts_lifted(theirs):
        assert off(torch.cat(out, dim=1), theirs(ids).logits) < (1e-4 if variant.startswith(HYBRID) else 5e-6)


@compiled
@pytest.mark.parametrize("name", ["qwen3", "qwen3_next", "qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replay_is_the_same_to_the_last_bit(in_cpp, name, dtype):
    """As the same operations called one by one, which they are while someone watches a module."""
    fast, watched = recordable(name, dtype=dtype).fuse(), []
    pieces = IDS.split([20, 1, 1, 1], dim=1)
    replayed = read(fast, pieces)
    handle, calls = fast.model.norm.register_forward_hook(lambda *_: watched.append(1)), 2 * len(fast.model.layers)
    assert torch.equal(read(fast, pieces), replayed) and len(watched) == 4
    handle.remove()
    with backend.intercept("add_rms_norm", lambda run, *args: (watched.append(1), run(*args))[1]):
        assert torch.equal(read(fast, pieces), replayed) and len(watched) == 4 + 4 * calls
    assert torch.equal(read(fast, pieces), replayed) and len(watched) == 4 + 4 * calls


@compiled
def test_many_sequences_are_recorded_from_their_first_token_on(in_cpp):
    """Nine rows go through a matrix unit where there is one, and whether there is one is not part of what is recorded."""
    fast = load_model(locate("tiny"), dtype="bfloat16", quantize="int4", device="cpu", progress=False).fuse()
    library.has_tiles.cache_clear()
    ids, cache = torch.randint(0, 500, (9, 4), generator=torch.Generator().manual_seed(5)), fast.make_cache()
    replayed = [fast(ids[:, t : t + 1], None, cache) for t in range(4)]
    assert is_recorded(cache)
    fast.model.norm.register_forward_hook(lambda *_: None)
    cache = fast.make_cache()
    for t, y in enumerate(replayed):
        assert torch.equal(fast(ids[:, t : t + 1], None, cache), y) and not y.isnan().any()
    assert not is_recorded(cache)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 3)), st.tuples(st.just("step"), st.integers(1, 9)),
        st.tuples(st.just("truncate"), st.floats(0, 1)), st.tuples(st.just("select"), st.integers(0, 2)),
        st.tuples(st.just("copy"), st.just(0)), st.tuples(st.just("restore"), st.just(0)), st.tuples(st.just("other"), st.just(0)),
        st.tuples(st.just("eager"), st.just(0)), st.tuples(st.just("watch"), st.just(0)), st.tuples(st.just("mark"), st.just(0)),
        st.tuples(st.just("remember"), st.integers(0, 3)),
    ), min_size=3, max_size=14,
)  # fmt: skip


@compiled
@pytest.mark.parametrize("name, bound", [("qwen3", 5e-6), ("qwen3_5", 1e-4)])
@given(ACTIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_whatever_happens_to_the_cache(name, bound, actions):
    """Steps between anything a cache can go through give what the model gives for all tokens at once."""
    ours, remembered = recordable(name), 0
    fast, g = ours.fuse(), torch.Generator().manual_seed(1)
    with backend.use("cpp"), torch.inference_mode():
        ids = torch.randint(0, 211, (2, 62), generator=g)  # the buffer has 64 places
        cache = fast.make_cache()
        fast(ids, None, cache)
        kept, held = (cache.snapshot(), 0), ids
        for action, value in actions:
            if action in ("read", "step", "eager", "watch", "other"):
                counts = {"read": [value], "step": [1] * int(value)}.get(action, [1])
                for count in counts:
                    new = torch.randint(0, 211, (ids.shape[0], count), generator=g)
                    ids = torch.cat((ids, new), dim=1)
                    if action == "eager":
                        with backend.use("eager"):
                            y = fast(new, None, cache)
                    elif action == "watch":
                        with backend.intercept("swiglu", lambda run, *args: run(*args)):
                            y = fast(new, None, cache)
                    else:
                        y = (ours if action == "other" else fast)(new, None, cache)
                    assert off(y, ours(ids)[:, -count:]) < bound, (action, ids.shape)
                    assert action != "step" or is_recorded(cache) or (remembered and name == "qwen3_5")
            elif action == "truncate":
                length = cache.reachable(max(int(value * cache.length), 1))
                if length:
                    cache.truncate(length)
                    ids = ids[:, :length]
            elif action == "mark":
                cache.mark()
            elif action == "remember":
                cache.remember(value)
                remembered = value
            elif action == "select":
                rows = torch.tensor([[0], [ids.shape[0] - 1, 0], list(range(ids.shape[0]))][value])
                cache.select(rows)
                ids = ids[rows]
            elif action == "copy":
                kept, held, cache = (cache.snapshot(), remembered), ids, copy.deepcopy(cache)
            else:
                cache.restore(kept[0])
                ids, remembered = held, kept[1]


@compiled
def test_two_caches_and_two_models_in_turn(in_cpp):
    one, two = recordable().fuse(), recordable(seed=5).fuse()
    apart = [read(fast, ids.split(1, dim=1)) for fast, ids in ((one, IDS), (one, IDS.flip(1)), (two, IDS))]
    sides = [(one, IDS, one.make_cache()), (one, IDS.flip(1), one.make_cache()), (two, IDS, two.make_cache())]
    together = [[fast(ids[:, t : t + 1], None, cache) for t in range(23)] for fast, ids, cache in sides]
    assert all(torch.equal(torch.cat(y, dim=1), x) for y, x in zip(together, apart, strict=True))
    turns = [[], [], []]
    sides = [(fast, ids, fast.make_cache()) for fast, ids, _ in sides]
    for t in range(23):
        for out, (fast, ids, cache) in zip(turns, sides, strict=True):
            out.append(fast(ids[:, t : t + 1], None, cache))
    assert all(torch.equal(torch.cat(y, dim=1), x) for y, x in zip(turns, apart, strict=True))
    cache = one.make_cache()
    one(IDS[:, :5], None, cache)
    two(IDS[:, 5:6], None, cache)  # another model's step over the same buffers
    assert cache.steps[-1].stack is two.model
    one(IDS[:, 6:7], None, cache)
    assert cache.steps[-1].stack is one.model


@compiled
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_recorded(tmp_path, format):
    """In bf16, with no more error than the formulas have; not where a product's columns are shuffled on the way, or groups have lengths that
    packed.h has not."""
    checkpoint(tmp_path, "qwen2", format)
    exact, model = load_model(tmp_path, dtype=torch.float32), load_model(tmp_path, dtype=torch.bfloat16)
    pieces = IDS.split([20, 1, 1, 1], dim=1)
    with torch.inference_mode():
        with backend.use("eager"):
            truth, formulas = exact(IDS), model(IDS).float()
        fast = model.fuse()
        with backend.use("cpp"):
            cache, out = fast.make_cache(), []
            for piece in pieces:
                out.append(fast(piece, None, cache))
            error = (torch.cat(out, dim=1).float() - truth).norm()
    assert error <= 1.25 * (formulas - truth).norm()
    assert is_recorded(cache) != ("act-order" in format)


@compiled
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: cache.snapshot()], ids=["deepcopy", "snapshot"])
def test_a_copied_cache_has_a_record_of_its_own(in_cpp, copied):
    """Both go on with different tokens; and what a step gave is not the next step's memory."""
    ours = recordable()
    fast, cache = ours.fuse(), ours.make_cache()
    for t in range(3):
        fast(IDS[:1, t : t + 1], None, cache)
    other, out = copied(cache), ([], [])
    assert other.steps == []  # which knows the model, and would take a copy of it along
    for t in range(3, 9):
        for states, row, held in zip(out, (0, 1), (cache, other), strict=True):
            states.append(fast.model(IDS[row : row + 1, t : t + 1], None, held))
    assert is_recorded(cache) and is_recorded(other)
    for states, row in zip(out, (0, 1), strict=True):
        whole = ours.model(torch.cat((IDS[:1, :3], IDS[row : row + 1, 3:9]), dim=1))
        assert off(torch.cat(states, dim=1), whole[:, 3:]) < 5e-6


@compiled
def test_what_cpp_has_not_is_never_recorded(in_cpp):
    # A window, heads that attention.h cannot read.
    for variant in ("qwen2 sliding", "qwen3"):
        ours = plain(variant)
        fast, cache = ours.fuse(), ours.make_cache()
        out = [fast(IDS[:, t : t + 1], None, cache) for t in range(5)]
        assert not is_recorded(cache) and off(torch.cat(out, dim=1), ours(IDS[:, :5])) < (1e-4 if variant in HYBRID else 5e-6)
    fast = recordable().double().fuse()
    cache = fast.make_cache()
    fast(IDS[:, :1], None, cache)
    assert cache.steps == []


@compiled
def test_states_that_are_remembered_are_recorded_once_wherever_they_are(in_cpp):
    ours = recordable("qwen3_5")
    fast = ours.fuse()
    cache, out = fast.make_cache(rewind=2), []
    for t in range(9):
        out.append(fast(IDS[:, t : t + 1], None, cache))
    assert is_recorded(cache) and len(cache.steps) == 1
    cache.truncate(7)
    out[7:] = [fast(IDS[:, t : t + 1], None, cache) for t in (7, 8)]
    assert off(torch.cat(out, dim=1), ours(IDS[:, :9])) < 1e-4 and len(cache.steps) == 1
    assert all(len(layer._pool) == 3 for layer in cache.layers if isinstance(layer, RecurrentCache))
    cache.remember(0)  # from now on they are written over
    out += [fast(IDS[:, t : t + 1], None, cache) for t in range(9, 12)]
    assert off(torch.cat(out, dim=1), ours(IDS[:, :12])) < 1e-4 and is_recorded(cache) and len(cache.steps) == 2


@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize("choice", ["eager", pytest.param("cpp", marks=compiled)])
def test_a_few_tokens_are_stepped_through_and_taken_back(name, choice):
    """As guesses are, one row's behind padding: three tokens in one pass, of which none to three were right."""
    ours = recordable(name)
    fast, layers, steps = ours.fuse(), sum(block.linear for block in ours.model.layers), []
    positions = torch.arange(23).repeat(2, 1)
    positions[1] = (positions[1] - 4).clamp_min(-1)
    with torch.inference_mode(), backend.use(choice):
        exact = ours(IDS, positions)
        cache = fast.make_cache(rewind=3)
        fast(IDS[:, :6], positions[:, :6], cache)
        with backend.intercept("gated_delta_step", lambda run, *args: (steps.append(1), run(*args))[1]):
            for right in (3, 0, 2, 1, 3):
                start = cache.length
                guesses = IDS[:, start : start + 3].clone()
                guesses[:, right:] = 7
                out = fast(guesses, None, cache)
                assert off(out[:, :right], exact[:, start : start + right]) < 1e-4 if right else True
                assert off(out[0, right:], exact[0, start + right : start + 3]) > 1e-2 if right < 3 else True
                cache.truncate(start + right)
            assert len(steps) == 5 * 3 * layers
            assert off(fast(IDS[:, 15:19], None, cache), exact[:, 15:19]) < 1e-4  # more than are remembered: not stepped through
        assert len(steps) == 5 * 3 * layers


@compiled
@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_tokens_in_one_pass_have_the_bits_of_single_ones(in_cpp, name, dtype):
    """So guesses cannot change an answer. Passes of two to four tokens, recorded or replayed, the last of them taken back."""
    fast, ids = recordable(name, dtype).fuse(), torch.randint(3, 211, (1, 60), generator=torch.Generator().manual_seed(4))
    cache = fast.make_cache()
    fast(ids[:, :8], None, cache)
    alone = torch.cat([fast(ids[:, t : t + 1], None, cache) for t in range(8, 60)], dim=1)
    assert is_recorded(cache)
    for count in (2, 3, 4):
        cache, out = fast.make_cache(), []
        fast(ids[:, :8], None, cache)
        cache.remember(count)
        while (start := cache.length) < 56:
            guesses, right = ids[:, start : start + count].clone(), 1 + 7 * start % count
            guesses[:, right:] = 1
            out.append(fast(guesses, None, cache)[:, :right])
            cache.truncate(start + right)
            assert is_recorded(cache) and len(cache.steps) == 1 and cache.steps[0].shape[1] == count
        assert torch.equal(torch.cat(out, dim=1), alone[:, : cache.length - 8])


@compiled
def test_memory_of_states_serves_in_and_out_of_inference_mode():
    ours = recordable("qwen3_5")
    fast, out = ours.fuse(), []
    cache = fast.make_cache(rewind=3)
    with backend.use("cpp"):
        with torch.inference_mode():
            out += [fast(piece, None, cache) for piece in IDS[:, :11].split([9, 1, 1], dim=1)]
        out += [fast(piece, None, cache) for piece in IDS[:, 11:].split([1, 1, 3, 3, 4], dim=1)]
    assert off(torch.cat(out, dim=1), ours(IDS)) < 1e-4


@compiled
def test_a_record_keeps_no_model_that_is_gone_and_nothing_that_it_cannot_use(in_cpp):
    ours = recordable("qwen3_5_moe")
    cache = ours.make_cache(rewind=6)
    ours(IDS[:1, :3], None, cache)
    for start, count in ((3, 2), (5, 6)):  # six tokens' experts are no one call
        fast = ours.fuse()
        fast(IDS[:1, start : start + count], None, cache)
        (step,) = cache.steps
        assert step.stack is fast.model and step.tape.whole == (count == 2)
        assert bool(step.tape._held) == bool(step.tape._cells.size) == step.tape.whole


@compiled
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_a_record_holds_none_of_the_memory_that_passes_are_lent(in_cpp, monkeypatch, name):
    """It would never be free again, and with it the memory of the longest prompt would stay."""
    monkeypatch.setattr(memory, "_LARGE", 1)
    monkeypatch.setattr(memory, "_pool", memory._Pool())
    fast, ids = recordable(name).fuse(), torch.arange(40).view(1, 40)
    cache = fast.make_cache()
    for piece in ids.split([37, 1, 1, 1], dim=1):
        fast(piece, None, cache)
    gc.collect()
    assert is_recorded(cache) and bool(memory._pool.sheets) == hasattr(mmap, "MADV_HUGEPAGE")
    assert not any(sheet.lent for sheet in memory._pool.sheets)


def test_a_fused_model_says_that_its_logits_are_no_numbers():
    model, tokenizer = qr.load("tiny", dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(NumericsError, match="of model.layers.1.mlp.down_proj"):
        qr.generate(model, tokenizer, "Once", max_tokens=2)
    with pytest.raises(NumericsError, match="a module that the model it was fused of would name"):
        qr.generate(model.fuse(), tokenizer, "Once", max_tokens=2)


@compiled
def test_another_choice_is_another_record(in_cpp):
    ours = recordable()
    fast, cache = ours.fuse(), ours.make_cache()
    for t in range(3):
        fast(IDS[:, t : t + 1], None, cache)
    assert is_recorded(cache)
    with backend.use({"swiglu": "eager"}):
        fast(IDS[:, 3:4], None, cache)
        assert not is_recorded(cache)
        assert off(fast(IDS[:, 4:5], None, cache), ours(IDS)[:, 4:5]) < 5e-6
    assert off(fast(IDS[:, 5:6], None, cache), ours(IDS)[:, 5:6]) < 5e-6 and is_recorded(cache)


@compiled
def test_recorded_outside_inference_mode_and_weights_that_went_away():
    ours = recordable()
    exact = ours(IDS)
    fast = ours.fuse()
    with backend.use("cpp"):
        cache = fast.make_cache()
        with torch.inference_mode():
            fast(IDS[:, :3], None, cache)
            fast(IDS[:, 3:4], None, cache)
        assert off(fast(IDS[:, 4:5], None, cache), exact[:, 4:5]) < 5e-6
        ours.to(torch.float16).float()  # its old numbers are held by the record
        torch.full((1 << 20,), float("nan"))
        assert off(fast.model(IDS[:, 5:6], None, cache), fast.model(IDS[:, :6])[:, 5:]) < 1e-2


@compiled
def test_recording_imports_no_compiler():
    """PyTorch's would be 140 MB."""
    code = """
import sys, torch, qwen_ref as qr
from qwen_ref import backend
model, tokenizer = qr.load("tiny", dtype=torch.float32)
backend.use("cpp")
print(qr.generate(model.fuse(), tokenizer, "Once", max_tokens=3, temperature=0)[0].text, "torch._dynamo" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip().endswith("False"), out.stderr
