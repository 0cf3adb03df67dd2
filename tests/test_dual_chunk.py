"""Dual chunk attention against its definition pair by pair, its two implementations against each other, and Qwen2.5-1M."""

from __future__ import annotations

import cmath
import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import qwen_ref as qr
from qwen_ref import backend, ops
from qwen_ref.errors import ConfigError, RequestError
from qwen_ref.generate import Session
from qwen_ref.loading import ASSETS, build, load_model
from qwen_ref.models import qwen2
from qwen_ref.quant.gguf_meta import write_config
from qwen_ref.tokenizer import Tokenizer

IDS = torch.randint(0, 211, (3, 37), generator=torch.Generator().manual_seed(2))
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32, logits of scale 1..10: sums in another order
SIZES = st.integers(2, 30).flatmap(lambda chunk: st.tuples(st.just(chunk), st.integers(1, chunk - 1)))


def distance(i: int, j: int, chunk: int, local: int) -> int:
    """How far apart query i and key j <= i stand, by the definition of one pair."""
    span = chunk - local
    (n, a), (m, b) = divmod(i, span), divmod(j, span)
    if n == m:
        return a - b
    if n == m + 1:
        return min(a + span, chunk) - b
    return min(2 * span - 1, chunk) - b


# ------------------------------------------------------------------------------------------------- the position maps


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(0, 6), st.integers(-2, 2), st.integers(0, 200))
@example((2, 1), 3, 0, 0)
@example((30, 1), 1, -1, 0)
@example((11, 3), 2, 0, 1)
@example((262144, 8192), 3, 0, 253952)
def test_positions_at_and_around_every_border(sizes, chunks_before, offset, back):
    """A query at a multiple of the span, or up to two tokens off; a key anywhere before it, or near a border itself."""
    chunk, local = sizes
    span = chunk - local
    i = max(chunks_before * span + offset, 0)
    maps = ops.dual_chunk_positions(torch.tensor([[i]]), chunk, local)
    assert maps.shape == (1, 3, 1)
    for j in {max(i - back, 0), max(i - span, 0), max(i - span - 1, 0), i // span * span, max(i // span * span - 1, 0), 0, i}:
        place = int(ops.dual_chunk_positions(torch.tensor([[j]]), chunk, local)[0, 0, 0])
        kind = min(i // span - j // span, 2)
        found = int(maps[0, kind, 0]) - place
        assert found == distance(i, j, chunk, local)
        assert 0 <= found <= chunk or span == 1  # (chunks of one token: 2 span - 1 = 1 = the distance of a neighbour)
        if i - j <= local and kind < 2:
            assert found == i - j, "within `local` tokens the distance is the true one"
        if kind:
            assert found <= i - j, "and it is never longer"


def test_length_scale():
    lengths = torch.tensor([0, 1, 262144, 262145, 1010000])
    expected = [1, 1, 1, 0.1 * math.log(262145 / 262144) + 1, 0.1 * math.log(1010000 / 262144) + 1]
    assert ops.length_scale(lengths, 262144).tolist() == pytest.approx(expected, rel=1e-6)
    assert ops.length_scale(lengths, 0).tolist() == [1] * 5


# ------------------------------------------------------------------------------------------------- the formulas


def inputs(batch: int, heads: int, kv_heads: int, held: int, count: int, sizes, *, dim: int = 6, dtype=torch.float64, seed=0,
           padding: tuple[int, ...] = (), scale: tuple[float, ...] = (1.0,)):  # fmt: skip
    """(arguments of `dual_chunk_attention` for the last `count` of `held` tokens, q and k as they were before rotation)."""
    chunk, local = sizes
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, count, dim, generator=g, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, held, dim, generator=g, dtype=torch.float64).to(dtype)
    positions = torch.arange(held)[None]
    if padding:
        positions = (positions - torch.tensor(padding)[:, None]).clamp_min(-1)
    frequencies = ops.rope_frequencies(dim, 100.0).double()

    def rotated(x, at):
        angles = (at[..., None] * frequencies).repeat(1, 1, 2)
        return ops.rope(x, angles.cos().to(dtype), angles.sin().to(dtype))

    maps = ops.dual_chunk_positions(positions[:, held - count :], chunk, local)
    queries = torch.stack([rotated(q, maps[:, i]) for i in range(3)], dim=2)
    keys = rotated(k, positions % (chunk - local))
    args = queries, keys, v, positions[:, held - count :], positions, chunk - local, torch.tensor(scale)
    return args, (q, k)


def by_pairs(args, raw, sizes) -> torch.Tensor:
    """The definition: for every pair, q turned by the distance of the two against k as it is; complex numbers, no matrices."""
    (_, _, v, q_at, k_at, _, scale), (q, k) = args, raw
    batch, heads, count, dim = q.shape
    frequencies = ops.rope_frequencies(dim, 100.0).double().tolist()
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        m = float(scale[b % len(scale)])
        for n in range(heads):
            own = n // (heads // k.shape[1])
            for t in range(count):
                i = int(q_at[b % len(q_at), t])
                if i < 0:
                    continue
                scores = {}
                for s, j in enumerate(k_at[b % len(k_at)].tolist()):
                    if 0 <= j <= i:
                        d = distance(i, j, *sizes)
                        x, y = q[b, n, t].tolist(), k[b, own, s].tolist()
                        turned = [complex(x[f], x[f + dim // 2]) * cmath.exp(1j * d * w) for f, w in enumerate(frequencies)]
                        scores[s] = sum((z * complex(y[f], y[f + dim // 2]).conjugate()).real for f, z in enumerate(turned))
                weights = {s: math.exp(m * m * score / math.sqrt(dim)) for s, score in scores.items()}
                for s, w in weights.items():
                    out[b, n, t] += w / sum(weights.values()) * v[b, own, s]
    return out


@pytest.mark.parametrize("run", [ops.dual_chunk_attention, ops.dual_chunk_blocked])
@pytest.mark.parametrize("sizes", [(11, 3), (5, 1), (7, 6), (40, 5), (2, 1)])
def test_the_definition_pair_by_pair(run, sizes):
    args, raw = inputs(2, 4, 2, 26, 19, sizes, padding=(0, 4), scale=(1.0, 1.25))
    expected, seen = by_pairs(args, raw, sizes), args[3] >= 0  # (B, T)
    ours = run(*args)
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours.transpose(1, 2)[seen], expected.transpose(1, 2)[seen], rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, held=st.integers(1, 40), share=st.floats(0, 1), tile=st.integers(1, 200), groups=st.sampled_from([(4, 2), (3, 3), (6, 1)]),
       padding=st.tuples(st.integers(0, 9), st.integers(0, 9)), seed=st.integers(0, 9))  # fmt: skip
def test_tiles_of_any_size_are_the_exact_formula(sizes, held, share, tile, groups, padding, seed):
    count = max(1, round(share * held))
    padding = tuple(min(p, held - 1) for p in padding)
    args, _ = inputs(2, *groups, held, count, sizes, padding=padding, scale=(1.1, 1.0), seed=seed)
    exact, tiled = ops.dual_chunk_attention(*args), ops.dual_chunk_blocked(*args, tile)
    assert torch.isfinite(exact).all() and torch.isfinite(tiled).all()
    seen = args[3] >= 0
    torch.testing.assert_close(tiled.transpose(1, 2)[seen], exact.transpose(1, 2)[seen], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_chunk_is_plain_attention(dtype):
    """The exact one to the last bit; the tiled one loses no more than twice what it does."""
    (q, k, v, q_at, k_at, span, scale), _ = inputs(2, 6, 2, 30, 21, (40, 8), dtype=dtype)
    plain = ops.attention(q[:, :, 0], k, v)
    assert torch.equal(ops.dual_chunk_attention(q, k, v, q_at, k_at, span, scale), plain)
    exact = ops.attention(q[:, :, 0].double(), k.double(), v.double())
    tiled = ops.dual_chunk_blocked(q, k, v, q_at, k_at, span, scale, 64)
    assert (tiled - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_in_tiles(dtype):
    args, _ = inputs(2, 6, 2, 70, 70, (16, 5), dtype=dtype, scale=(1.3,))
    wide = [a.double() if a.is_floating_point() and a.dim() > 1 else a for a in args[:5]] + list(args[5:])
    exact = ops.dual_chunk_attention(*wide)
    own, tiled = ops.dual_chunk_attention(*args), ops.dual_chunk_blocked(*args, 100)
    assert own.dtype == tiled.dtype == dtype
    assert (tiled - exact).norm() <= 1.25 * (own - exact).norm()


def test_the_tiled_one_never_holds_the_score_matrix():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return result

    args, _ = inputs(1, 2, 1, 700, 700, (200, 50), dtype=torch.float32, dim=4)
    with Largest() as tiled:
        ours = ops.dual_chunk_blocked(*args, tile=1024)
    with Largest() as exact:
        truth = ops.dual_chunk_attention(*args)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    assert exact.numel >= 3 * 2 * 700 * 700 and tiled.numel <= args[0].numel()  # the queries themselves


FAULTS = {
    "no clamp of the chunk before": lambda p, c, lo: torch.stack((p % (c - lo), p % (c - lo) + c - lo, p * 0 + min(2 * (c - lo) - 1, c)), 1),
    "earlier chunks at chunk - 1": lambda p, c, lo: REAL(p, c, lo) - torch.tensor([0, 0, 1])[:, None],
    "chunks of `chunk` tokens": lambda p, c, lo: REAL(p, c, 0),
    "plain rotation": lambda p, c, lo: p[:, None].expand(-1, 3, -1),
}
REAL = ops.dual_chunk_positions


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    monkeypatch.setattr(ops, "dual_chunk_positions", FAULTS[fault])
    args, raw = inputs(1, 2, 1, 26, 26, (11, 3))
    assert float((ops.dual_chunk_attention(*args) - by_pairs(args, raw, (11, 3))).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------- the model


def make(changes: dict | None = None, dtype=torch.float32, **chunks: int) -> qwen2.Model:
    raw = {**qwen2.TINY_1M, **(changes or {})}
    raw["dual_chunk_attention_config"] = {**qwen2.TINY_1M["dual_chunk_attention_config"], **chunks}
    model = qwen2.Model(qwen2.Config.from_json(raw)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        std = 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5
        p.copy_(torch.randn(p.shape, generator=generator) * std + name.endswith("norm.weight"))
    return model.to(dtype)


SCALED, UNSCALED = make(), make(original_max_position_embeddings=0)


def read(model, ids, cuts, positions=None, expect=None):
    cache, parts = model.make_cache(), []
    if expect is not None:
        cache.expect(expect)
    for a, b in pairwise([0, *cuts, ids.shape[1]]):
        parts.append(model(ids[:, a:b], None if positions is None else positions[:, a:b], cache))
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("implementation", ["eager", "torch"])
@pytest.mark.parametrize("name", ["unscaled", "scaled"])
def test_every_split_point_and_token_by_token(name, implementation):
    """Across the borders of chunks of 8 tokens; where scores grow with the length, the prompt's length is said first."""
    model, expect = (UNSCALED, None) if name == "unscaled" else (SCALED, [29])
    ids = IDS[:1, :29]
    with backend.use(implementation):
        whole = model(ids)
        for split in range(1, 29):
            torch.testing.assert_close(read(model, ids, [split], expect=expect)[0], whole, **CLOSE)
        torch.testing.assert_close(read(model, ids, list(range(1, 29)), expect=expect)[0], whole, **CLOSE)


@given(cuts=st.sets(st.integers(1, 36), max_size=4), padding=st.tuples(*[st.integers(0, 30)] * 2), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("implementation", ["eager", "torch"])
def test_padded_rows_are_the_rows_alone(implementation, cuts, padding, seed):
    ids = torch.randint(0, 211, (2, 37), generator=torch.Generator().manual_seed(seed))
    positions = torch.stack([(torch.arange(37) - p).clamp_min(-1) for p in padding])
    with backend.use(implementation):
        out, cache = read(SCALED, ids, sorted(cuts), positions, expect=[37 - p for p in padding])
        after = SCALED(ids[:, :1], cache=cache)
        for row, p in enumerate(padding):
            alone, own = read(SCALED, ids[row : row + 1, p:], [])
            torch.testing.assert_close(out[row, p:], alone[0], **CLOSE)
            torch.testing.assert_close(after[row], SCALED(ids[row : row + 1, :1], cache=own)[0], **CLOSE)


def test_keys_are_kept_unscaled_and_take_the_scale_of_the_length():
    """In a single layer keys and values do not depend on the scale, so that any reading ends in the same last logits; with
    the length unsaid, earlier logits are those of the length there was."""
    model = make({"num_hidden_layers": 1})
    stepped, _ = read(model, IDS, list(range(1, 37)))
    for end in (9, 14, 25, 37):
        torch.testing.assert_close(stepped[:, end - 1], model(IDS[:, :end])[:, -1], **CLOSE)
    assert not torch.allclose(stepped[:, 24], model(IDS)[:, 24], **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "torch"])
def test_one_chunk_of_the_original_context_is_the_plain_model(implementation):
    plain = qwen2.Model(qwen2.Config.from_json(qwen2.TINY)).eval().requires_grad_(False)
    for chunks, same in (({"chunk_size": 40}, 37), ({"chunk_size": 41, "original_max_position_embeddings": 37}, 37), ({}, 8),
                         ({"chunk_size": 60, "original_max_position_embeddings": 20}, 20)):
        model = make(**{"original_max_position_embeddings": 0, **chunks})
        plain.load_state_dict(model.state_dict())
        with backend.use(implementation):
            assert torch.equal(model(IDS[:, :same]), plain(IDS[:, :same]))
            if same == 20:  # from here on scores grow
                assert not torch.allclose(model(IDS[:, : same + 1])[:, -1], plain(IDS[:, : same + 1])[:, -1], **CLOSE)


def test_past_the_first_chunk_but_within_every_distance_it_is_still_plain():
    """Chunks of 30 tokens with 20 true ones across the border: up to token 50 every distance is the true one."""
    model = make(chunk_size=50, local_size=20, original_max_position_embeddings=0)
    plain = qwen2.Model(qwen2.Config.from_json(qwen2.TINY)).eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    ids = torch.cat((IDS, IDS), 1)
    torch.testing.assert_close(model(ids[:, :51]), plain(ids[:, :51]), **CLOSE)
    assert not torch.allclose(model(ids[:, :53])[:, -1], plain(ids[:, :53])[:, -1], **CLOSE)


def test_truncate_and_select():
    _, cache = read(SCALED, IDS, [5, 20], expect=[37] * 3)
    cache.truncate(18)
    cache.select(torch.tensor([2, 0]))
    cache.expect([37, 37])
    torch.testing.assert_close(SCALED(IDS[[2, 0], 18:], cache=cache), SCALED(IDS[[2, 0]])[:, 18:], **CLOSE)


def test_what_was_decoded_can_be_cut_and_no_token_of_another_scale_serves():
    """A token behind the prompt has the scale of its own place, which it would have again."""
    _, cache = read(SCALED, IDS[:, :25], [20, 21, 22, 23, 24], expect=[20] * 3)
    cache.truncate(25)
    cache.expect([20] * 3)
    assert cache.reachable(25) == 25
    cache.truncate(22)
    again, _ = read(SCALED, IDS[:, :23], [20, 21, 22], expect=[20] * 3)
    torch.testing.assert_close(SCALED(IDS[:, 22:23], cache=cache), again[:, 22:], **CLOSE)
    cache.expect([22, 20, 20])
    assert cache.reachable(22) == 0 and cache.reachable(0) == 0
    with pytest.raises(RequestError, match="holds 3 sequences, and 2 lengths are expected"):
        cache.expect([20, 20])


def test_generate_reads_the_prompt_in_chunks_at_its_whole_length():
    tokenizer = Tokenizer.load(ASSETS / "tiny")
    model = make({"vocab_size": tokenizer.vocab_size + 3})
    prompts = [[3 + 5 * i % 200 for i in range(n)] for n in (30, 6, 21)]
    expected = []
    for prompt in prompts:
        cache, step, out = model.make_cache(), torch.tensor([prompt]), []
        for _ in range(8):
            out.append(int(model(step, cache=cache)[0, -1, : tokenizer.vocab_size].argmax()))
            step = torch.tensor([[out[-1]]])
        expected.append(out)
    for chunk in (512, 7):
        results = qr.generate(model, tokenizer, prompts, max_tokens=8, temperature=0, ignore_eos=True, prefill_chunk=chunk)
        assert [r.token_ids for r in results] == expected


def test_a_session_keeps_no_token_read_with_another_scale():
    """Trained to 13: up to there every turn takes over the one before, beyond it only one of a prompt as long."""
    tokenizer = Tokenizer.load(ASSETS / "tiny")
    model = make({"vocab_size": tokenizer.vocab_size})
    session, options = Session(model), {"max_tokens": 3, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    ids = [3 + 5 * i % 200 for i in range(30)]
    for length, cached in ((6, 0), (9, 6), (13, 9), (18, 0), (18, 17), (25, 0), (12, 0), (30, 0)):
        [result] = qr.generate(model, tokenizer, [ids[:length]], session=session, **options)
        [alone] = qr.generate(model, tokenizer, [ids[:length]], **options)
        assert [t.logprob for t in result.logprobs] == pytest.approx([t.logprob for t in alone.logprobs], abs=1e-5)
        assert result.usage.cached_tokens == cached


# ------------------------------------------------------------------------------------------------- hooks and verify


@pytest.mark.parametrize("count", [8, 37])
def test_hooks_see_both_kinds_of_attention(count):
    ids = IDS[:, :count]
    with backend.use("eager"):
        logits, acts = SCALED.run_with_cache(ids, "*hook_*")
        assert torch.equal(logits, SCALED(ids)) and set(acts) == set(SCALED.list_hooks())
    values = ops.repeat_kv(acts["v", 1].transpose(1, 2), 6)
    pattern = acts["pattern", 1]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 6, count))
    torch.testing.assert_close(acts["z", 1], (pattern @ values).transpose(1, 2))
    assert acts["rot_q", 1].shape == (3, count, 6, 16) and acts["rot_k", 1].shape == (3, count, 2, 16)
    with backend.use("eager"):
        edited = SCALED.run_with_hooks(ids, [("blocks.1.attn.hook_pattern", lambda x, hook: x * 0)])
        assert torch.equal(edited, SCALED.run_with_hooks(ids, [("blocks.1.attn.hook_z", lambda x, hook: x * 0)]))


def test_transformers_agrees_as_far_as_it_goes():
    """It ignores the chunks, and in the first one there is nothing to ignore."""
    report = qr.verify(make(chunk_size=256, original_max_position_embeddings=128), progress=False)
    assert report.ok, report.table()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_knows_the_operation(dtype, monkeypatch):
    """L1 tries it, and L5 holds far beyond the first chunk: it says how long the prompt is."""
    model = make(dtype=dtype)
    report = qr.verify(model, levels="L1,L5", backend={"dual_chunk_attention": "torch"}, progress=False)
    names = [check.name for check in report.checks]
    assert report.ok and any(name.startswith("dual_chunk_attention[torch] arguments") for name in names)
    assert "dual_chunk_attention[torch] = eager" in names
    wrong = backend.Implementation("wrong", lambda: lambda *args: ops.dual_chunk_attention(*args[:5], args[5] + 1, args[6]))
    monkeypatch.setitem(backend.dual_chunk_attention.implementations, "wrong", wrong)
    assert not qr.verify(model, levels="L1", backend={"dual_chunk_attention": "wrong"}, progress=False).ok


# ------------------------------------------------------------------------------------------------- files


OFFICIAL = {  # config.json of Qwen2.5-7B-Instruct-1M
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064, "rope_theta": 10000000.0, "max_position_embeddings": 1010000,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 1010000,
    "max_window_layers": 28, "hidden_act": "silu",
    "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144},
}  # fmt: skip


def test_the_official_config():
    model = build(OFFICIAL)
    assert model.num_parameters() == 7_615_616_512  # of Qwen2.5-7B
    assert model.config.dual_chunk.span == 253_952 and model.config.rope.theta == 1e7
    assert qwen2.Config.from_json(model.config.to_json()) == model.config


@pytest.mark.parametrize("chunks, message", [
    ({"chunk_size": 8, "local_size": 8}, "local_size is 8"), ({"chunk_size": 1}, "chunk_size"), ({"local_size": 0}, "local_size"),
    ({"chunk_size": "8192"}, "chunk_size"), ({"original_max_position_embeddings": -1}, "original_max"), ([8192], "not an object"),
    ({"chunk_size": 1 << 60}, "chunk_size"),
])  # fmt: skip
def test_a_wrong_value_is_named(chunks, message):
    with pytest.raises(ConfigError, match=message):
        build({**qwen2.TINY, "dual_chunk_attention_config": chunks})


@pytest.mark.parametrize("beside", [
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
])
def test_it_is_refused_beside_other_ways_to_read_far(beside):
    with pytest.raises(ConfigError, match="beside YaRN or a sliding window"):
        build({**qwen2.TINY_1M, **beside})


def test_gguf_has_no_counterpart():
    with pytest.raises(ConfigError, match="dual_chunk_attention_config has no counterpart in GGUF"):
        write_config(SCALED.config.to_json())


def test_saved_read_back_and_the_approximation_of_engines_noted(tmp_path):
    SCALED.save(tmp_path / "m")
    again = load_model(tmp_path / "m", device="cpu")
    assert again.load_report.notes == [] and torch.equal(again(IDS), SCALED(IDS))
    path = tmp_path / "m" / "config.json"
    raw = json.loads(path.read_text())
    raw["dual_chunk_attention_config"] |= {"sparse_attention_enabled": True, "sparse_attention_config": {}}
    path.write_text(json.dumps(raw))
    assert "attention is exact here" in load_model(path.parent, device="cpu").load_report.notes[0]
