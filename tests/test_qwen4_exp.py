"""Qwen4-Exp's own parts: residual streams, embeddings of hashed n-grams, attention over chosen blocks, their caches.

Each against transformers' module or a defining library, and against a loop written out here.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from itertools import pairwise

import pytest
import sympy
import torch
import transformers
from conftest import TINY, casts_lifted, make_pair
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_gotchas import far_apart, operation, replaced
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen4_exp import modeling_qwen4_exp as official

from qwen_ref import backend, ops, study, torch_ops
from qwen_ref.cache import IndexedKVCache, JoinedCache
from qwen_ref.describe import describe
from qwen_ref.errors import CheckpointError, ConfigError
from qwen_ref.layers import ShardedEmbedding
from qwen_ref.loading import build, load_model
from qwen_ref.models import qwen4_exp
from qwen_ref.strict_json import write_json
from qwen_ref.verify import oracle

CONFIG = TINY["qwen4_exp"][1]
EOS = 13
IDS = torch.randint(0, 211, (2, 23), generator=torch.Generator().manual_seed(1))
EDGES = IDS.clone()  # sentences that end at every distance from each other
EDGES[:, [2, 3, 5, 8, 12, 13, 14, 22]] = EOS
EDGES[1, [0, 1, 10]] = EOS


@pytest.fixture(scope="module")
def pair():
    return make_pair(CONFIG, torch.float64)


# ------------------------------------------------------------------------------------------------- hashed n-grams


def wrapped(number: int) -> int:
    """A 64-bit two's complement integer."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def rows_of(tokens, multipliers, sizes, offsets):
    """The rows of every token, by Python's integers: walk back until an end of sentence."""
    order, heads = len(multipliers), len(sizes) // (len(multipliers) - 1)
    out = []
    for p, token in enumerate(tokens):
        back, ended = [token], False
        for s in range(1, order):
            ended = ended or p < s or tokens[p - s] == EOS
            back.append(EOS if ended else tokens[p - s])
        row = []
        for n in range(2, order + 1):
            mixed = 0
            for s in range(n):
                mixed ^= wrapped(back[s] * multipliers[s])
            h = slice((n - 2) * heads, (n - 1) * heads)
            row += [mixed % size + offset for size, offset in zip(sizes[h], offsets[h], strict=True)]
        out.append(row)
    return out


def test_splitmix64_is_the_published_generator():
    """The first outputs from state 0, as listed for java.util.SplittableRandom and xoshiro's seeding."""
    gamma = 0x9E3779B97F4A7C15
    found = [ops.splitmix64(i * gamma % 2**64) for i in range(3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


TOKEN = st.one_of(st.just(EOS), st.integers(0, 210), st.integers(0, 2**63 - 1))


@given(tokens=st.lists(TOKEN, min_size=1, max_size=12), order=st.integers(2, 5), index=st.integers(0, 3), cut=st.integers(0, 12))
@example(tokens=[2**63 - 1, EOS, EOS, 2**62, 5, 5, 5], order=4, index=1, cut=3)
@settings(max_examples=150, deadline=None)
def test_rows_are_exact_integers_in_any_number_of_passes(tokens, order, index, cut):
    """Products beyond 2^63 wrap around, as they do in Python's integers taken modulo 2^64."""
    multipliers = ops.ngram_multipliers(248320, order, index, 1234)
    sizes = ops.primes_from(10**6, 2 * (order - 1))
    offsets = [sum(sizes[:h]) for h in range(len(sizes))]
    tables = (torch.tensor(x) for x in (multipliers, sizes, offsets))
    tables, ids = tuple(tables), torch.tensor([tokens])
    history = torch.cat((torch.full((1, order - 1), EOS), ids), 1)
    parts = [ops.ngram_rows(ids[:, a:b], history[:, a : a + order - 1], *tables, EOS)
             for a, b in ((0, min(cut, len(tokens))), (min(cut, len(tokens)), len(tokens)))]  # fmt: skip
    assert torch.cat(parts, 1)[0].tolist() == rows_of(tokens, multipliers, sizes, offsets)


@pytest.mark.parametrize("vocab,order,index,seed", [(248320, 3, 0, 1234), (248320, 4, 2, 0), (211, 3, 1, 2**62), (1, 2, 0, 7)])
def test_multipliers_are_transformers(vocab, order, index, seed):
    mine = ops.ngram_multipliers(vocab, order, index, seed)
    assert mine == official._build_layer_multipliers(vocab, order, index, seed).tolist()
    assert all(m % 2 and m * (vocab - 1) < 2**63 for m in mine)


def test_primes_are_sympys():
    assert ops.primes_from(20_000_000, 16) == list(sympy.primerange(20_000_000, 20_000_400))[:16]
    assert ops.primes_from(0, 30) == list(sympy.primerange(2, 114))
    pseudoprimes = [561, 2047, 25326001, 3215031751, 3474749660383, 341550071728321, 3825123056546413051]
    for number in [*range(300), *pseudoprimes, 2**61 - 1, 2**63 - 25, 2**63 - 26, (2**31 - 1) ** 2]:
        assert ops.is_prime(number) == bool(sympy.isprime(number)), number


@pytest.mark.parametrize("index", [0, 1])
def test_the_official_tables_are_transformers(index):
    """Sizes of the released model, the table itself on the meta device."""
    raw = {**OFFICIAL, "ple_layer_ids": [2, 3]}
    fields = {k: v for k, v in raw.items() if k != "model_type"}
    with torch.device("meta"):
        theirs = official.Qwen4ExpTextNGramEmbedding(transformers.Qwen4ExpTextConfig(**fields), 2560, 1, index)
        mine = qwen4_exp.NGramEmbedding(qwen4_exp.Config.from_json(raw), index)
    assert mine.constants["ngram_heads_vocab_sizes"].tolist() == theirs.head_vocab_sizes
    assert mine.constants["ngram_heads_offsets"].tolist() == theirs.head_offsets
    assert mine.ngram_embedding.weight.shape == theirs.ngram_embedding.weight.shape
    assert len(mine.ngram_embedding.shards()) == 128


@pytest.mark.parametrize("ids", [IDS, EDGES], ids=["text", "sentences"])
def test_rows_are_those_transformers_looks_up(pair, ids):
    ours, theirs = pair
    seen = []
    table = theirs.model.layers[1].ple.ple_embedding.ngram_embedding
    handle = table.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    theirs(ids)
    handle.remove()
    _, acts = ours.run_with_cache(ids, "*hook_rows")
    assert torch.equal(acts["rows", 1], seen[0])
    sizes, offsets = (ours.model.layers[1].ple.ple_embedding.constants[f"ngram_heads_{x}"].tolist() for x in ("vocab_sizes", "offsets"))
    multipliers = ops.ngram_multipliers(211, 3, 0, 1234)
    assert seen[0].tolist() == [rows_of(row, multipliers, sizes, offsets) for row in ids.tolist()]


def test_gate_and_convolution_by_hand():
    g = torch.Generator().manual_seed(3)
    key, query = (torch.randn(2, 7, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    value = torch.randn(2, 7, 5, generator=g, dtype=torch.float64)
    key[0, 0, 0] = 0  # a score of exactly zero: the root's floor has the sign 0
    got = ops.ngram_gate(key, query, value)
    for b in range(2):
        for t in range(7):
            for s in range(3):
                score = float(key[b, t, s] @ query[b, t, s]) / 5**0.5
                root = (max(abs(score), 1e-6)) ** 0.5 * ((score > 0) - (score < 0))
                torch.testing.assert_close(got[b, t, s], value[b, t] / (1 + 2.718281828459045**-root), rtol=1e-12, atol=1e-12)
    x, weight = torch.randn(2, 9, 4, generator=g, dtype=torch.float64), torch.randn(4, 3, generator=g, dtype=torch.float64)
    out, state = ops.dilated_conv1d(x, weight, None, 2)
    for t in range(9):
        total = sum(weight[:, i] * x[:, t - 2 * (2 - i)] for i in range(3) if t >= 2 * (2 - i))
        torch.testing.assert_close(out[:, t], total * total.sigmoid(), rtol=1e-12, atol=1e-12)
    assert torch.equal(state, x[:, -4:].mT)
    for cut in range(1, 9):
        first, state = ops.dilated_conv1d(x[:, :cut], weight, None, 2)
        second, state = ops.dilated_conv1d(x[:, cut:], weight, state, 2)
        torch.testing.assert_close(torch.cat((first, second), 1), out, rtol=1e-13, atol=1e-13)
        assert torch.equal(state, x[:, -4:].mT)


# ------------------------------------------------------------------------------------------------- residual streams


def test_streams_by_hand(pair):
    """u and what is written back, one stream and one number at a time, and transformers' module."""
    ours, theirs = pair
    module, other = ours.model.layers[0].mlp_hyper_connection, theirs.model.layers[0].mlp_hyper_connection
    x = torch.randn(2, 4, 3, 48, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 3
    u, logits = module(x)
    weight = module.hc_norm.weight.view(3, 48)
    normed = torch.stack([x[:, :, s] / (x[:, :, s].pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight[s]) for s in range(3)], 2)
    flat = normed.reshape(2, 4, 144)
    low = flat @ module.input_mix_weight_down.weight.T / 3
    m = (low * low.sigmoid() @ module.input_mix_weight_up.weight.T).sigmoid()
    by_hand = sum(m[..., s * 48 : s * 48 + 48] * normed[:, :, s] for s in range(3)) / 3
    torch.testing.assert_close(u, by_hand, rtol=1e-12, atol=1e-12)
    out = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gain = 2 / (1 + (-(flat @ module.block_inject_weight.weight.T) / 3).exp())
    written = backend.stream_write(x, out, logits)
    for s in range(3):
        torch.testing.assert_close(written[:, :, s], x[:, :, s] + gain[..., s, None] * out, rtol=1e-12, atol=1e-12)
    with casts_lifted(theirs):
        mixed, _, injection = other(x.flatten(2))
    torch.testing.assert_close(u, mixed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.stream_gain(logits), injection, rtol=1e-12, atol=1e-12)
    assert torch.equal(ops.stream_gain(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_streams_round_as_transformers(dtype):
    ours, theirs = make_pair(CONFIG, dtype)
    x = torch.randn(2, 4, 3, 48, generator=torch.Generator().manual_seed(4)).to(dtype)
    u, logits = ours.model.layers[0].attn_hyper_connection(x)
    mixed, _, injection = theirs.model.layers[0].attn_hyper_connection(x.flatten(2))
    assert torch.equal(u, mixed) and torch.equal(ops.stream_gain(logits), injection)
    assert torch.equal(ours.model.hyper_connection_mixer(x), theirs.model.hyper_connection_mixer(x.flatten(2)))


# ------------------------------------------------------------------------------------------------- chosen blocks


def attended(q, k, v, blocks, starts, ratio):
    """One softmax per query and head over a list of tokens."""
    out, (batch, heads, count, dim), length = torch.zeros_like(q), q.shape, k.shape[2]
    for b in range(batch):
        start = 0 if starts is None else int(starts[b])
        for t in range(count):
            own = length - count + t
            complete = (own + 1 - start) // ratio
            read = [start + i * ratio + j for i in blocks[b, t].tolist() if i >= 0 for j in range(ratio)]
            read += range(start + complete * ratio, own + 1)
            for n in range(heads if own >= start else 0):
                group = n // (heads // k.shape[1])
                out[b, n, t] = torch.softmax(k[b, group, read] @ q[b, n, t] * dim**-0.5, 0) @ v[b, group, read]
    return out


@pytest.mark.parametrize("run,gather_from", [(ops.sparse_block_attention, 0), (torch_ops.sparse_block_attention, 0),
                                             (torch_ops.sparse_block_attention, 99)], ids=["eager", "gathered", "masked"])
@pytest.mark.parametrize("starts", [None, [0, 7, 23]], ids=["full", "padded"])
@pytest.mark.parametrize("count,length,ratio,top", [(5, 31, 3, 2), (31, 31, 4, 3), (1, 31, 3, 4), (31, 31, 2, 1), (9, 31, 1, 2)])
def test_sparse_attention_by_hand(run, gather_from, starts, count, length, ratio, top, monkeypatch):
    monkeypatch.setattr(torch_ops, "GATHER_BYTES", 5000)  # a few queries at a time
    monkeypatch.setattr(torch_ops, "GATHER_FROM", gather_from)
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(3, n, s, 8, generator=g, dtype=torch.float64) for n, s in ((6, count), (2, length), (2, length)))
    starts = None if starts is None else torch.tensor(starts)
    complete = ops.complete_blocks(count, length, ratio, starts, q.device)
    first = ops.block_starts(length, ratio, starts, q.device)
    blocks = ops.select_blocks(torch.rand(3, count, first.shape[1], generator=g), complete, top)
    out = run(q, k, v, blocks, starts, ratio)
    real = (torch.arange(length - count, length) >= (0 if starts is None else starts[:, None])).expand(3, -1)
    assert out.isfinite().all()
    expected = attended(q, k, v, blocks, starts, ratio)
    torch.testing.assert_close(out.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-10, atol=1e-12)
    taken = (blocks >= 0).sum(-1)
    assert torch.equal(taken, complete.clamp(max=top).expand_as(taken)) and bool((blocks < complete[..., None]).all())


def test_many_keys_are_read_without_a_matrix_of_all_scores():
    """Nothing that passes through memory has as many numbers as queries times keys."""
    count, length, ratio, top = 256, 8192, 4, 4
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, n, s, 16, generator=g) for n, s in ((4, count), (2, length), (2, length)))
    complete = ops.complete_blocks(count, length, ratio, None, q.device)
    blocks = torch.stack([torch.randperm(int(c), generator=g)[:top] for c in complete[0]])[None]
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    with Watch():
        out = torch_ops.sparse_block_attention(q, k, v, blocks, None, ratio)
    assert max(largest) < count * length
    torch.testing.assert_close(out, ops.sparse_block_attention(q, k, v, blocks, None, ratio), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 3, 8])
def test_the_indexer_chooses_what_transformers_chooses(padding):
    """The same tokens for every query, by transformers' module; scores of zero in two of three blocks, so that ties count."""
    ours, theirs = make_pair(CONFIG)
    mine, other = ours.model.layers[2].self_attn.indexer, theirs.model.layers[2].self_attn.indexer
    x = torch.randn(2, 23, 48, generator=torch.Generator().manual_seed(8))
    for module in (mine, other):  # one head's worth of variety: many queries like few blocks
        module.index_qk_proj.weight.data[20:160] = module.index_qk_proj.weight.data[:20].repeat(7, 1)
    positions = torch.arange(23).repeat(2, 1)
    positions[1] = (positions[1] - padding).clamp_min(-1)
    mask = ops.visible(positions, positions) & (positions >= 0)[:, None, :, None]
    tables = ours.model.rotary_emb(positions.clamp_min(0), x.dtype)
    blocks = ours.model.blocks(positions, True, x.dtype)
    chosen = mine(x, tables, blocks, None)
    got = ops.block_mask(chosen, 23, blocks.starts, 2) & mask
    expected = other(x, tables, mask, None) & mask
    assert torch.equal(got, expected)
    assert int(got.sum(-1).max()) == 7  # three blocks of two, and the tail


def test_blocks_do_not_depend_on_what_comes_later():
    """Equal scores are common (relu): the choice among them must not change when the text goes on."""
    scores = torch.zeros(1, 4, 30)
    complete = torch.tensor([[9, 9, 17, 30]])
    chosen = ops.select_blocks(scores, complete, 5)
    for t, held in enumerate(complete[0].tolist()):
        assert torch.equal(chosen[0, t], ops.select_blocks(scores[:, t : t + 1, :held], complete[:, t : t + 1], 5)[0, 0])
        assert len(chosen[0, t].unique()) == 5


def test_dense_below_the_budget_and_one_block():
    """With fewer than budget + c tokens everything is read, to the bit; with one more the last query has a choice."""
    sparse, wide = make_pair(CONFIG)[0], make_pair({**CONFIG, "indexer_budget": 600})[0]
    with torch.no_grad():
        assert torch.equal(sparse(IDS[:, :7]), wide(IDS[:, :7]))
        with backend.use("eager"):
            few, all_ = sparse(IDS[:, :8]), wide(IDS[:, :8])
    torch.testing.assert_close(few[:, :7], all_[:, :7], rtol=1e-5, atol=1e-5)
    assert (few[:, 7] - all_[:, 7]).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------- every activation


@pytest.mark.parametrize("padding", [0, 9])
def test_every_activation_is_transformers(pair, padding):
    ours, theirs = pair
    positions = torch.arange(23).repeat(2, 1)
    positions[1] = (positions[1] - padding).clamp_min(-1)
    mine = oracle.capture_ours(ours, EDGES, positions)
    with casts_lifted(theirs):
        reference = oracle.capture_theirs(theirs, EDGES, positions)
    assert len(mine) > 120
    for name, point in oracle.points(ours).items():
        if point.dims.startswith("BT") and not name.startswith("rotary"):
            a, b = mine[name][positions >= 0], reference[name][positions >= 0]
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


VARIANTS = {
    "two tables": {"ple_layer_ids": [5, 1, 2, 1], "layer_types": ["linear_attention"] * 2 + ["full_attention"] * 2 + ["linear_attention"]},
    "no table": {"ple_layer_ids": None},
    "whole heads rotated": {"rope_parameters": None, "indexer_head_dim": 26},
    "silu gate": {"output_gate_type": None},
    "weights as they are": {"norm_topk_prob": False, "hc_count": 2, "attention_bias": True},
    "blocks of three, one end token": {"indexer_budget": 9, "indexer_compress_ratio": 3, "eos_token_id": 13, "ngram_size": 2},
    "4-grams": {"ngram_size": 4, "ple_embed_dim": 36, "ple_conv_kernel_size": 2, "seed": 99},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    config = {k: v for k, v in {**CONFIG, **VARIANTS[variant]}.items() if v is not None}
    ours, theirs = make_pair(config, torch.float64)
    with torch.no_grad(), casts_lifted(theirs):
        torch.testing.assert_close(ours(EDGES), theirs(EDGES).logits, rtol=1e-9, atol=1e-10)
    assert qwen4_exp.Config.from_json(ours.config.to_json()) == ours.config


# ------------------------------------------------------------------------------------------------- planted faults


def whole_norm(x, weight, eps):
    """N2 over all streams at once instead of each by itself."""
    if weight.dim() == 1:
        return ops.zero_centred_rms_norm(x, weight, eps)
    return ops.zero_centred_rms_norm(x.flatten(-2), weight.flatten(), eps).view_as(x)


def no_relu(q, keys):
    return torch.einsum("bthd,bpd->btp", q, keys) / q.shape[-1] ** 0.5


def last_of_block(self, keys, padded, dtype):
    found = real_blocks(self, keys, padded, dtype)
    return found and found._replace(rope=self.rotary_emb.tables(keys.gather(1, found.first + self.ratio - 1), dtype))


def own_block_kept(scores, complete, top):
    """The newest complete block is always read."""
    last = torch.arange(scores.shape[2]) == complete[..., None] - 1
    return real_select(scores.masked_fill(last, torch.inf), complete, top)


def without_tail(q, k, v, blocks, starts, ratio):
    mask = ops.block_mask(blocks, k.shape[2], starts, ratio)
    own = torch.arange(k.shape[2])[None] // ratio == ops.complete_blocks(q.shape[2], k.shape[2], ratio, starts, q.device)[0, :, None]
    return ops.attention(q, k, v, mask & ~own)


def across_sentences(tokens, before, multipliers, sizes, offsets, eos):
    return real_rows(tokens, before, multipliers, sizes, offsets, -1)


def unsigned(key, query):
    return real_match(key, query).abs()


def undilated(x, weight, state, dilation):
    return real_conv(x, weight, None, 1)


real_blocks, real_select, real_match = qwen4_exp.Decoder.blocks, ops.select_blocks, ops.ngram_match
real_rows, real_conv = ops.ngram_rows, ops.dilated_conv1d
FAULTS = {
    "norm over all streams": lambda: operation("zero_centred_rms_norm", whole_norm),
    "streams summed": lambda: operation("stream_mix", lambda n, w: 3 * ops.stream_mix(n, w)),
    "streams mixed by softmax": lambda: operation("stream_mix", lambda n, w: (w.softmax(-2) * n).mean(-2)),
    "gain without its 2": lambda: operation("stream_write", lambda x, out, w: ops.stream_write(x, out / 2, w)),
    "gain not divided by n": lambda: operation("stream_write", lambda x, out, w: ops.stream_write(x, out, 3 * w)),
    "scores without relu": lambda: operation("block_scores", no_relu),
    "block keys rotated at their last token": lambda: replaced(qwen4_exp.Decoder, "blocks", last_of_block),
    "newest block forced in": lambda: replaced(ops, "select_blocks", own_block_kept),
    "tail left out": lambda: operation("sparse_block_attention", without_tail),
    "block keys summed first": lambda: replaced(ops, "block_means", lambda k, first, c: k.gather(1, first[..., None].expand(2, -1, 20))),
    "n-grams across sentences": lambda: replaced(ops, "ngram_rows", across_sentences),
    "multipliers of another layer": lambda: replaced(
        ops, "ngram_rows", lambda t, b, m, *rest: real_rows(t, b, torch.tensor(ops.ngram_multipliers(211, 3, 1, 1234)), *rest)),
    "gate without the sign": lambda: replaced(sys.modules["qwen_ref.ops.ngram"], "ngram_match", unsigned),
    "convolution of neighbours": lambda: replaced(ops, "dilated_conv1d", undilated),
    "silu gate": lambda: operation("gated_rms_norm", lambda x, g, w, eps, a="silu": ops.gated_rms_norm(x, g, w, eps, "silu")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, pair, monkeypatch):
    monkeypatch.setattr(sys.modules["test_gotchas"], "IDS", EDGES)
    with backend.use("eager"):
        assert not far_apart(*pair)
        with FAULTS[fault]():
            assert far_apart(*pair)


# ------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("run", ["eager", "torch"])
def test_sentences_in_any_passes(pair, run, padding):
    """Splits at and around ends of sentences, and around the edges of blocks, beside a padded sequence."""
    model = pair[0]
    positions = torch.arange(23).repeat(2, 1)
    positions[1] = (positions[1] - padding).clamp_min(-1)
    with torch.no_grad(), backend.use({"sparse_block_attention": run}):
        whole = model(EDGES, positions)
        for cuts in ((1, 6, 7, 8, 9), (12, 13, 14, 15), tuple(range(1, 23)) if run == "torch" else (2, 3, 4)):
            cache = model.make_cache()
            parts = [model(EDGES[:, a:b], positions[:, a:b], cache) for a, b in pairwise((0, *cuts, 23))]
            torch.testing.assert_close(torch.cat(parts, 1)[positions >= 0], whole[positions >= 0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(whole[1, padding:], model(EDGES[1:, padding:])[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
@pytest.mark.parametrize("run", ["eager", "torch"])
def test_a_sequence_that_is_all_padding_in_the_first_pass(pair, run, chunk):
    """Prompts of 23, 9 and 3 tokens, read together in pieces, and alone in one pass."""
    ids = torch.cat((EDGES, IDS[:1]))
    padding = torch.tensor([0, 14, 20])[:, None]
    positions = (torch.arange(23) - padding).clamp_min(-1)  # (3, 23)
    with torch.no_grad(), backend.use({"sparse_block_attention": run}):
        cache = pair[0].make_cache()
        pieces = [(i, min(i + chunk, 23)) for i in range(0, 23, chunk)]
        together = torch.cat([pair[0](ids[:, a:b], positions[:, a:b], cache) for a, b in pieces], 1)
        for row, first in enumerate(padding[:, 0].tolist()):
            alone = pair[0](ids[row : row + 1, first:])[0]
            torch.testing.assert_close(together[row, first:], alone, rtol=1e-9, atol=1e-10)


def test_no_sequence_sees_another(pair):
    """Rows taken over, doubled, snapshotted, cut back: as if each had been read alone."""
    model = pair[0]
    with torch.no_grad():
        cache = model.make_cache(rewind=3)
        model(EDGES[:, :15], cache=cache)
        cache.select(torch.tensor([1, 0, 1]))
        kept = cache.snapshot()
        rows = EDGES[[1, 0, 1]]
        rows[2, 15:] = 7
        whole = model(rows)[:, 15:]
        close = {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(model(rows[:, 15:], cache=cache), whole, **close)
        cache.restore(kept)
        torch.testing.assert_close(model(rows[:, 15:17], cache=cache), whole[:, :2], **close)
        cache.truncate(15)
        torch.testing.assert_close(model(rows[:, 15:], cache=cache), whole, **close)
        cache.truncate(0)
        torch.testing.assert_close(model(EDGES[:1], cache=model.make_cache()), model(EDGES[:1]), **close)
        assert kept.length == 15


def test_what_is_kept(pair):
    model = pair[0]
    with torch.no_grad():
        cache = model.make_cache()
        model(IDS, cache=cache)
    delta, joined, indexed, *_ = cache.layers
    assert isinstance(joined, JoinedCache) and isinstance(indexed, IndexedKVCache)
    history, ids = joined.embedding.state
    assert history.shape == (2, 144, (5 - 1) * 3) and torch.equal(ids, IDS[:, -2:])
    assert joined.nbytes() == delta.nbytes() + history.nbytes + ids.nbytes
    assert indexed._index.shape == (2, 64, 20) and indexed.nbytes() == 8 * 64 * 2 * (2 * 2 * 24 + 20)
    copied = indexed.copy()
    assert copied._index.shape[1] == 23 and copied.nbytes() == 8 * 23 * 2 * (2 * 2 * 24 + 20)
    indexed._index[:, :23] = 0
    assert copied._index.abs().min() > 0


# ------------------------------------------------------------------------------------------------- the table in its files


def sparse_folder(folder, base: int):
    """A checkpoint whose table has no bytes on disk but those of chosen rows; returns the model's names and shapes."""
    config = {**CONFIG, "ngram_vocab_size_base": base, "dtype": "float32"}
    meta = build(config).to(torch.bfloat16)
    small = make_pair(CONFIG)[0]
    folder.mkdir()
    write_json(folder / "config.json", config)
    tensors = {n: t for n, t in small.checkpoint_tensors().items() if "ngram_embedding.shard" not in n}
    shapes = {n: tuple(t.shape) for n, t in meta.checkpoint_tensors().items() if "ngram_embedding.shard" in n}
    save_file({n: t.clone() for n, t in {**tensors, **meta.constants}.items()}, folder / "model-1.safetensors")
    weight_map, places = dict.fromkeys([*tensors, *meta.constants], "model-1.safetensors"), {}
    for i, half in enumerate((list(shapes)[:4], list(shapes)[4:])):
        header, at, file = {}, 0, f"model-{2 + i}.safetensors"
        for name in half:
            end = at + shapes[name][0] * shapes[name][1] * 2
            header[name], at = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, end]}, end
        raw = json.dumps(header).encode()
        raw += b" " * (-(8 + len(raw)) % 64)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + at)
        places |= {name: (folder / file, 8 + len(raw) + header[name]["data_offsets"][0]) for name in half}
        weight_map |= dict.fromkeys(half, file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return meta, shapes, places


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages by /proc and needs sparse files")
def test_a_table_larger_than_memory_is_read_row_by_row(tmp_path):
    """8.6 GB of bf16 in a model of fp32. Only rows that tokens ask for are read, and nothing else touches it."""
    meta, shapes, places = sparse_folder(tmp_path / "m", 134_000_000)
    size = 2 * sum(rows * dim for rows, dim in shapes.values())
    assert size > 8_500_000_000
    table = meta.model.layers[1].ple.ple_embedding
    before = table.context(EDGES[:, :0], None)
    rows = ops.ngram_rows(EDGES, before, *table.constants.values(), EOS)  # (2, 23, 8)
    assert rows.max() < sum(r for r, _ in shapes.values()) and rows.max() > 900_000_000
    height, values = next(iter(shapes.values()))[0], torch.randn(rows.numel(), 4).to(torch.bfloat16)
    names = list(shapes)
    for row, value in zip(rows.flatten().tolist(), values, strict=True):
        path, start = places[names[row // height]]
        with open(path, "r+b") as file:
            file.seek(start + row % height * 8)
            file.write(value.view(torch.uint8).numpy().tobytes())
    written = {row: value for row, value in zip(rows.flatten().tolist(), values, strict=True)}

    start = resident()
    model = load_model(tmp_path / "m", device="cpu", progress=False)
    assert model.dtype == torch.float32 and model.load_report.mapped >= size
    assert model.num_parameters() == meta.num_parameters() and model.weight_bytes() > size
    assert not any("ngram" in name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    _, acts = model.run_with_cache(EDGES, "*ple.hook_embed")
    expected = torch.stack([written[row] for row in rows.flatten().tolist()]).view(2, 23, 8, 4)
    assert torch.equal(acts["embed", 1], expected)
    model.to(torch.float64)
    assert model(EDGES).isfinite().all() and model.dtype == torch.float64
    assert describe(tmp_path / "m").total == meta.num_parameters()
    assert resident() - start < 300_000_000
    assert sum(os.stat(path).st_blocks * 512 for path, _ in places.values()) < 50_000_000
    assert "mapped" in repr(model)


def test_a_table_in_memory_and_one_in_files_are_the_same(tmp_path):
    model = make_pair(CONFIG)[0]
    model.save(tmp_path / "m")
    mapped, held = (load_model(tmp_path / "m", device="cpu", mapped=choice, progress=False) for choice in (True, False))
    tables = [m.model.layers[1].ple.ple_embedding.ngram_embedding for m in (mapped, held)]
    assert [t.mapped for t in tables] == [True, False]
    for other in (mapped, held):  # a product of mapped matrices may be summed in another order: they are aligned otherwise
        torch.testing.assert_close(other(EDGES), model(EDGES), rtol=1e-4, atol=1e-4)
    assert mapped.num_parameters() == held.num_parameters() == model.num_parameters()
    assert mapped.weight_bytes() == held.weight_bytes()
    mapped.save(tmp_path / "again")
    first, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("m", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    shards = [n for n in mapped.load_report.loaded if "shard_" in n]
    assert len(shards) == CONFIG["split_ngram_parts"] and len(mapped.load_report.constant) == 3


def test_rows_of_uneven_shards():
    table = ShardedEmbedding(10, 3, 4)
    table.weight.data = torch.randn(10, 3)
    whole, rows = table.weight.data.clone(), torch.randint(0, 10, (2, 5, 4))
    assert [len(x) for x in table.shards().values()] == [3, 3, 3, 1]
    expected = table(rows)
    table.map([x.clone() for x in table.shards().values()])
    assert torch.equal(table(rows), expected) and torch.equal(torch.cat(list(table.shards().values())), whole)
    assert table(rows[:0]).shape == (0, 5, 4, 3) and not list(table.parameters())
    table.map([x.to(dtype) for x, dtype in zip(table.shards().values(), (torch.bfloat16, torch.float16) * 2, strict=True)])
    assert torch.equal(table(rows), torch.cat([x.float() for x in table.shards().values()])[rows])  # no shard loses a bit


def rewritten(folder, model, change):
    """A checkpoint of `model` whose tensors `change` has been at."""
    model.save(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


PLE = "model.layers.1.ple.ple_embedding"


@pytest.mark.parametrize("name,value,message", [
    ("layer_multipliers", [1, 3, 5], r"layer_multipliers is \[1, 3, 5\], config.json determines \["),
    ("ngram_heads_vocab_sizes", [53] * 8, r"wrong value \(1\)"),
    ("ngram_heads_offsets", [0, 1], r"ngram_heads_offsets is torch.int64 \[2\], not torch.int64 \[8\]"),
])  # fmt: skip
def test_constants_that_contradict_the_config(tmp_path, name, value, message):
    folder = rewritten(tmp_path / "m", make_pair(CONFIG)[0], lambda w: w.update({f"{PLE}.{name}": torch.tensor(value)}))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, device="cpu", progress=False)


def test_constants_may_be_absent_and_draft_layers_are_passed_over(tmp_path):
    model = make_pair(CONFIG)[0]

    def change(weights):
        for name in [n for n in weights if n.startswith(PLE) and weights[n].dtype == torch.int64]:
            del weights[name]
        weights["mtp.fc.weight"] = torch.ones(2, 2)

    again = load_model(rewritten(tmp_path / "m", model, change), device="cpu", progress=False)
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    assert again.load_report.ignored == ["mtp.fc.weight"]


def test_a_missing_shard_is_named(tmp_path):
    folder = rewritten(tmp_path / "m", make_pair(CONFIG)[0], lambda w: w.pop(f"{PLE}.ngram_embedding.shard_4.weight"))
    with pytest.raises(CheckpointError, match=r"missing \(1\): .*shard_4\.weight"):
        load_model(folder, device="cpu", progress=False)


# ------------------------------------------------------------------------------------------------- config and sizes


OFFICIAL = {
    "model_type": "qwen4_exp_text", "vocab_size": 248320, "hidden_size": 2560, "num_hidden_layers": 48, "num_attention_heads": 24,
    "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 48, "num_experts": 512,
    "num_experts_per_tok": 10, "moe_intermediate_size": 640, "shared_expert_intermediate_size": 640, "hc_count": 4, "hc_lowrank": 320,
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4,
    "ple_layer_ids": [2], "ple_embed_dim": 2560, "ngram_size": 3, "heads_per_ngram": 8, "ngram_vocab_size_base": 20_000_000,
    "split_ngram_parts": 128, "output_gate_type": "sigmoid", "eos_token_id": 248044,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
}  # fmt: skip


def test_official_sizes_have_transformers_parameter_count():
    ours = build(OFFICIAL)
    fields = {k: v for k, v in OFFICIAL.items() if k != "model_type"}
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.Qwen4ExpTextConfig(**fields))
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
    table = ours.model.layers[1].ple.ple_embedding.ngram_embedding
    assert 51e9 < table.rows * table.dim < 52e9 and table.rows % 128 == 0
    assert ours.model.rotary_emb.frequencies.shape == (32,)
    names = {name for name, _ in ours.named_parameters()} | {name for name, _ in theirs.named_buffers() if "ngram" in name}
    assert {name for name, _ in theirs.named_parameters()} == names - {n for n, _ in theirs.named_buffers()}
    assert ours.constants.keys() == {name for name, _ in theirs.named_buffers() if ".ple." in name}


@pytest.mark.parametrize("change,message", [
    ({"indexer_kv_heads": 2}, "indexer_kv_heads must be 1"),
    ({"indexer_budget": 7}, "indexer_budget is 7, not a multiple"),
    ({"indexer_budget": None}, "indexer_budget is missing"),
    ({"indexer_head_dim": 10}, "indexer_head_dim is 10, less than the 12"),
    ({"ple_layer_ids": [3]}, "ple_layer_ids holds 3, a layer of indexed_attention"),
    ({"ple_layer_ids": [0]}, "ple_layer_ids holds 0"),
    ({"ple_layer_ids": [6]}, "ple_layer_ids holds 6"),
    ({"ple_layer_ids": 2}, "ple_layer_ids is 2, not a list"),
    ({"ple_embed_dim": 33}, "ple_embed_dim is 33, no multiple of the 8"),
    ({"eos_token_id": None}, "eos_token_id is missing"),
    ({"eos_token_id": []}, "eos_token_id is missing"),
    ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ({"hc_count": 1}, "hc_count is 1"),
    ({"output_gate_type": "relu"}, "output_gate_type is 'relu'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"ngram_size": 1}, "ngram_size is 1"),
    ({"num_experts": 0}, "num_experts is 0"),
    ({"num_experts_per_tok": 8}, "num_experts_per_tok is 8, more than the 7"),
    ({"layer_types": ["sliding_attention"] * 5}, "layer_types holds 'sliding_attention'"),
    ({"ngram_vocab_size_base": 1 << 50}, "ngram_vocab_size_base is"),
    ({"seed": -1}, "seed is -1"),
    ({"ngram_size": 64, "heads_per_ngram": 1024}, "asks for 64512 hash functions in 1 layers"),
])  # fmt: skip
def test_configs_that_are_refused(change, message):
    raw = {k: v for k, v in {**CONFIG, **change}.items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        build(raw)


def test_spellings_of_layer_types_and_end_tokens():
    types = ["linear_attention", "linear_attention", "full_attention", "linear_attention", "linear_attention"]
    config = qwen4_exp.Config.from_json({**CONFIG, "layer_types": types, "eos_token_id": 13})
    assert config.layer_types[2] == "indexed_attention" and config.eos_token_ids == (13,)
    nested = {"model_type": "qwen4_exp", "text_config": {**CONFIG, "layer_types": types, "eos_token_id": [13]}}
    assert qwen4_exp.Config.from_json(nested) == config
    theirs = transformers.AutoConfig.for_model("qwen4_exp_text", **{k: v for k, v in config.to_json().items() if k != "model_type"})
    assert theirs.layer_types == list(config.layer_types) and theirs.ple_layer_ids == [2]


def test_what_the_official_model_costs(tmp_path):
    write_json(tmp_path / "config.json", {**OFFICIAL, "dtype": "bfloat16"})
    found = describe(tmp_path, context=1000)
    rows = found.parameters["table of n-grams"]
    assert rows / 160 > 16 * 20_000_000  # sixteen heads, rows of 160 numbers
    expert = 3 * 2560 * 640 * 48
    assert found.total - found.active == rows - 2560 + 502 * expert
    assert found.kv_bytes == 1000 * found.kv_bytes_per_token == 1000 * 12 * 2 * (2 * 2 * 256 + 128)
    assert sum(found.parameters.values()) == found.total and found.weight_bytes == 2 * found.total


# ------------------------------------------------------------------------------------------------- studies


def test_the_lens_reads_all_streams_and_attribution_refuses(pair):
    ours = pair[0]
    lens = study.logit_lens.lens(ours, IDS[0].tolist(), top=3)
    with torch.no_grad():
        best = ours(IDS[:1])[0].argmax(-1)
    assert torch.equal(lens.top_ids[-1][:, 0], best)
    with pytest.raises(Exception, match="several residual streams"):
        study.attribution.attribute(ours, IDS[0].tolist(), 5)
