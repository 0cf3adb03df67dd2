"""Attention over packed, cached and paged sequences: the formulas against plain sums, and the Triton kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch
from test_kernels import needs_triton, python

from qwen_ref import ops
from qwen_ref.bench.subjects import subject


def plainly(q, k, v, seen):
    """One head in fp64, query by query: q (T, D), k and v (S, D), seen(i) -> the keys that query i sees."""
    rows = []
    for i, query in enumerate(q.double()):
        scores = torch.stack([query @ k[j].double() for j in seen(i)]) / q.shape[-1] ** 0.5
        weights = (scores - scores.max()).exp()
        rows.append(sum(w * v[j].double() for w, j in zip(weights, seen(i), strict=True)) / weights.sum())
    return torch.stack(rows)


# The formulas


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_prefill_is_attention_of_each_sequence(window):
    torch.manual_seed(0)
    lengths, held = (1, 5, 0, 3), (1, 5, 2, 7)
    q, k, v = torch.randn(9, 4, 6), torch.randn(15, 2, 6), torch.randn(15, 2, 6)
    starts = [torch.tensor(n).cumsum(0).int() for n in ((0, *lengths), (0, *held))]
    out = ops.attention_prefill(q, k, v, *starts, window)
    for b, (count, keys) in enumerate(zip(lengths, held, strict=True)):
        first, start = int(starts[0][b]), int(starts[1][b])

        def seen(i, past=keys - count):
            return range(max(0, past + i + 1 - (window or 99)), past + i + 1)

        for n in range(4) if count else ():
            mine = slice(first, first + count), n
            theirs = slice(start, start + keys), n // 2
            torch.testing.assert_close(out[mine].double(), plainly(q[mine], k[theirs], v[theirs], seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_decode_is_attention_over_what_is_held(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 4, 6), torch.randn(4, 2, 9, 6), torch.randn(4, 2, 9, 6)
    lengths = torch.tensor([1, 9, 0, 4], dtype=torch.int32)
    behind = torch.arange(9)[None, None, :, None] >= lengths[:, None, None, None]
    out = ops.attention_decode(q, k.masked_fill(behind, float("nan")), v.masked_fill(behind, float("inf")), lengths, window)
    assert torch.equal(out[2], torch.zeros(4, 6))
    for b in (0, 1, 3):
        kept = slice(max(0, int(lengths[b]) - (window or 99)), int(lengths[b]))
        alone = ops.attention(q[b, None, :, None], k[b, None, :, kept], v[b, None, :, kept])[0, :, 0]
        torch.testing.assert_close(out[b], alone)


@pytest.mark.parametrize("window", [None, 20])
def test_paged_is_decode_whatever_the_order_of_the_pages(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 6), torch.randn(3, 2, 64, 6), torch.randn(3, 2, 64, 6)
    lengths = torch.tensor([17, 0, 64], dtype=torch.int32)
    order = torch.randperm(12)
    pages = [torch.empty(12, 2, 16, 6).index_copy_(0, order, x.view(3, 2, 4, 16, 6).transpose(1, 2).flatten(0, 1)) for x in (k, v)]
    table = order.view(3, 4).int()
    table[0, 2:], table[1] = -1, 2**31 - 1  # never used
    assert torch.equal(ops.attention_paged(q, *pages, table, lengths, window), ops.attention_decode(q, k, v, lengths, window))


@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_costs_count_the_visible_pairs_and_what_they_touch(window):
    queries, keys, heads, kv_heads, dim = (3, 0, 7, 1), (9, 4, 7, 1), 4, 2, 6
    starts = [torch.tensor((0, *n)).cumsum(0).int() for n in (queries, keys)]
    q, k = torch.empty(11, heads, dim), torch.empty(21, kv_heads, dim)
    pairs = touched = 0
    for t, s in zip(queries, keys, strict=True):
        seen = ops.visible(torch.arange(s - t, s)[None], torch.arange(s)[None], window)
        pairs, touched = pairs + int(seen.sum()), touched + int(seen.any(-2).sum())
    cost = subject("attention_prefill").cost(q, k, k, *starts, window)
    assert cost.flops == 4 * heads * dim * pairs
    assert cost.bytes == 4 * (2 * q.numel() + 2 * touched * kv_heads * dim + 10)
    lengths = torch.tensor([5, 0, 40], dtype=torch.int32)
    seen = sum(min(n, window or n) for n in (5, 0, 40))
    q, pages, table = torch.empty(3, heads, dim), torch.empty(12, kv_heads, 16, dim), torch.empty(3, 4, dtype=torch.int32)
    cost = subject("attention_decode").cost(q, torch.empty(3, kv_heads, 50, dim), torch.empty(3, kv_heads, 50, dim), lengths, window)
    assert cost == (4 * (2 * q.numel() + 2 * seen * kv_heads * dim + 3), 4 * heads * dim * seen)
    paged = subject("attention_paged").cost(q, pages, pages, table, lengths, window)
    entries = len({(b, j // 16) for b, n in enumerate((5, 0, 40)) for j in range(max(0, n - (window or n)), n)})
    assert paged == (cost.bytes + 4 * entries, cost.flops)


# The kernels, in the interpreter, beside the generic check of test_kernels


@needs_triton
def test_what_the_models_call_is_the_formula_under_every_mask():
    """Grouped heads with no mask, left padding and a sliding window, and a query that sees nothing: the mean of all values,
    however the keys are split."""
    code = """
import torch
from qwen_ref import backend, ops
torch.manual_seed(0)
row = torch.arange(90)
padded = torch.stack((row, (row - 71).clamp(min=-1)))  # the second sequence: 71 of padding
nothing = torch.zeros(2, 1, 1, 90, dtype=torch.bool)
with backend.use({"attention": "triton"}, strict=True):
    for count in (1, 5):
        q, k, v = (torch.randn(2, t, n, 16).transpose(1, 2) for t, n in ((count, 4), (90, 2), (90, 2)))
        mine = padded[:, -count:]
        for mask in (None, ops.visible(mine, padded), ops.visible(row[None, -count:], row[None], 5), nothing.expand(2, 1, count, 90)):
            ours, formula = backend.attention(q, k, v, mask), ops.attention(q, k, v, mask)
            print(float((ours - formula).abs().max() / formula.abs().max()))
"""
    errors = [float(line) for line in python(code, interpret=True).split()]
    assert len(errors) == 8 and max(errors) < 2e-6, errors


@needs_triton
def test_bits_do_not_depend_on_the_page_size_the_rest_of_the_cache_or_the_other_sequences():
    code = """
import torch
from qwen_kernels import attention_decode, attention_paged, attention_prefill
torch.manual_seed(0)
q, k, v = torch.randn(2, 4, 16), torch.randn(2, 2, 256, 16), torch.randn(2, 2, 256, 16)
lengths = torch.tensor([203, 40], dtype=torch.int32)
whole = attention_decode.run(q, k, v, lengths)
behind = (torch.arange(256) >= lengths[:, None])[:, None, :, None]
print(torch.equal(whole, attention_decode.run(q, *(x.masked_fill(behind, float("nan")) for x in (k, v)), lengths)))
for page in (16, 128):
    order = torch.randperm(512 // page)
    pages = [torch.empty(512 // page, 2, page, 16).index_copy_(0, order, x.view(2, 2, -1, page, 16).transpose(1, 2).flatten(0, 1)) for x in (k, v)]
    print(torch.equal(whole, attention_paged.run(q, *pages, order.view(2, -1).int(), lengths)))
q, k, v = torch.randn(48, 4, 16), torch.randn(48, 2, 16), torch.randn(48, 2, 16)
starts = torch.tensor([0, 7, 7, 48], dtype=torch.int32)
packed = attention_prefill.run(q, k, v, starts, starts, 30)
alone = attention_prefill.run(q[7:], k[7:], v[7:], starts[2:] - 7, starts[2:] - 7, 30)
print((packed[7:] - alone).abs().max() < 1e-6)  # another size of block: not to the bit
k[:7], v[:7] = float("nan"), float("nan")
print(torch.equal(packed[7:], attention_prefill.run(q, k, v, starts, starts, 30)[7:]))
"""
    lines = python(code, interpret=True).split("\n")
    assert [("True" in line) for line in lines if line] == [True] * 5, lines


@needs_triton
def test_launchers_refuse_what_they_would_compute_wrongly():
    code = """
import torch
from qwen_kernels import attention, attention_decode, attention_paged, attention_prefill
from qwen_ref.errors import RequestError
q, k, starts, lengths = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
packed, cached = (q[0].transpose(0, 1), k[0].transpose(0, 1)), (q[:, :, 0], k)
for call in (
    lambda: attention.run(q, k.half(), k),
    lambda: attention.run(q, k[..., :4], k[..., :4]),
    lambda: attention.run(q[:, :3], k, k),
    lambda: attention.run(q, k[:, :, :2], k[:, :, :2]),
    lambda: attention.run(q, k, k, torch.zeros(3, 5, dtype=torch.bool)),
    lambda: attention.run(torch.randn(1, 1, 2, 300), *[torch.randn(1, 1, 2, 300)] * 2),
    lambda: attention.run(q, k.requires_grad_(), k),
    lambda: attention_prefill.run(packed[0], packed[1], packed[1], starts.long(), starts.long()),
    lambda: attention_prefill.run(packed[0], packed[1], packed[1], starts, starts, 0),
    lambda: attention_decode.run(*cached, k, lengths[:1]),
    lambda: attention_decode.run(q[:1, :, 0], k, k, lengths[:1]),
    lambda: attention_paged.run(*cached, k, lengths.view(2, 1).long(), lengths),
):
    k = k.detach()
    try:
        print("computed", call())
    except RequestError as error:
        print(error)
"""
    lines = python(code, interpret=True).splitlines()
    wanted = ("q's dtype", "q's dtype", "divide the heads", "too few keys", "bool mask", "up to 256", "no backward pass",
              "(B + 1,) int32", "own token", "lengths (2,)", "caches of 2", "table (2, L)")  # fmt: skip
    assert len(lines) == len(wanted)
    for line, text in zip(lines, wanted, strict=True):
        assert text in line, (line, text)
