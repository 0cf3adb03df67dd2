"""AWQ's and GPTQ's codes and scales, transposed in C++: byte for byte the definitions in PyTorch, and a naive unpacking."""

from __future__ import annotations

import pytest
import torch

from qwen_ref.cpp import library, repack
from qwen_ref.quant import awq, gptq, packed

needs_compiler = pytest.mark.skipif(library.why_not() is not None, reason=f"no compiled operations: {library.why_not()}")
INPUTS = [1, 2, 7, 8, 9, 63, 64, 65, 120, 127, 128, 129, 136, 384, 513]
WORDS = [1, 7, 8, 9, 15, 16, 17, 40]  # side by side in the file


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def naive(words, bits, order):
    """Code i of each word, as (rows, words, codes of a word); `order`: which of them comes when."""
    shifts = bits * torch.tensor(order)
    return (words.long()[..., None] >> shifts) % (1 << bits)


@needs_compiler
@pytest.mark.parametrize("inputs", INPUTS)
def test_awq_is_repacked_as_the_definition_says(inputs, monkeypatch):
    """Byte for byte what PyTorch makes, and what comes of unpacking, transposing and packing; memory behind it is left alone."""
    for count in WORDS:
        words = random_words(inputs, count)
        fast = repack.awq(words)
        codes = naive(words, 4, (0, 4, 1, 5, 2, 6, 3, 7)).flatten(1).T.to(torch.uint8)  # (N, K)
        assert torch.equal(fast, packed.pack4(codes)), count
        monkeypatch.setattr(repack, "supports", lambda words: False)
        assert torch.equal(fast, awq._transposed(words.clone())), count
        monkeypatch.undo()


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 15, 16, 17, 33, 48])
def test_gptq_is_repacked_as_the_definition_says(bits, rows, monkeypatch):
    for count in WORDS:
        words = random_words(rows, count)
        fast = gptq._transposed(words, bits)
        codes = naive(words, bits, range(32 // bits)).transpose(0, 1).flatten(1)  # (N, K)
        wanted = packed.pack4(codes.to(torch.uint8)) if bits == 4 else (codes - 128).to(torch.int8).view(torch.uint8)
        assert torch.equal(fast, wanted), count
        monkeypatch.setattr(repack, "supports", lambda words: False)
        assert torch.equal(fast, gptq._transposed(words, bits)), count
        monkeypatch.undo()


@needs_compiler
@pytest.mark.parametrize("groups", [1, 2, 15, 16, 33])
def test_zeros_are_repacked_as_the_definition_says(groups, monkeypatch):
    for count in WORDS:
        words = random_words(groups, count)
        for bits, more in ((4, 0), (4, 1), (8, 0), (8, 1)):
            zeros = (naive(words, bits, range(32 // bits)).flatten(1).T + more) % (1 << bits)
            scheme = gptq.GPTQ(bits, 32, more)
            assert torch.equal(scheme._zeros(words).long(), zeros)
            middle = words.clone()
            word = sum(((1 << bits - 1) - more) << bits * i for i in range(32 // bits))
            middle.fill_(word - (1 << 32) if word >= 1 << 31 else word)
            assert scheme._zeros(middle) is None
            middle[-1, -1] ^= 1 << 28  # of the last zero of all
            assert scheme._zeros(middle) is not None
        fast = awq._zeros(words)
        assert torch.equal(fast.long(), naive(words, 4, (0, 4, 1, 5, 2, 6, 3, 7)).flatten(1).T)
        monkeypatch.setattr(repack, "supports", lambda words: False)
        assert torch.equal(fast, awq._zeros(words)) and fast.dtype == awq._zeros(words).dtype
        monkeypatch.undo()


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 31, 32, 33, 64, 100])
def test_scales_are_transposed(rows):
    for columns in (1, 2, 15, 16, 30, 32, 34, 80):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            matrix = torch.randn(rows, columns).to(dtype)
            assert torch.equal(repack.transposed(matrix), matrix.T)
            assert repack.transposed(matrix).stride() in ((rows, 1), matrix.T.contiguous().stride())


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, outputs", [(1, 1), (3, 17), (16, 32), (37, 40)])
def test_act_order_is_put_right_while_repacking(bits, rows, outputs, monkeypatch):
    words, order = random_words(rows, outputs), torch.randperm(rows * 32 // bits)
    fast = gptq._transposed(words, bits, order)
    shifts = torch.arange(0, 32, bits)
    codes = (words[:, None].long() >> shifts[:, None] & (1 << bits) - 1).flatten(0, 1)  # (K, N)
    codes = codes[order].T.clone(memory_format=torch.contiguous_format).to(torch.uint8)
    assert torch.equal(fast, packed.pack4(codes) if bits == 4 else codes ^ 128)
    with pytest.raises(IndexError, match="beyond"):
        repack.gptq(words, bits, order=order + 1)
    with pytest.raises(IndexError, match="shape"):
        repack.gptq(words, bits, order=order[:-1])
    monkeypatch.setattr(repack, "supports", lambda words: False)
    assert torch.equal(gptq._transposed(words, bits, order), fast)


@needs_compiler
def test_threads_share_what_is_large(monkeypatch):
    """Of every way to repack, more than two tiles down and across."""
    words, scales, order = random_words(600, 1040), torch.randn(600, 1040).half(), torch.randperm(600 * 8)
    fast = [awq._transposed(words), gptq._transposed(words, 4), gptq._transposed(words, 4, order), repack.transposed(scales)]
    monkeypatch.setattr(repack, "why_not", lambda: "no compiler")
    plain = [awq._transposed(words), gptq._transposed(words, 4), gptq._transposed(words, 4, order), scales.T]
    for i, (one, other) in enumerate(zip(fast, plain, strict=True)):
        assert torch.equal(one, other), i


@needs_compiler
@pytest.mark.parametrize("operation, width", [("repack_awq", 65), ("repack_gptq", 68), ("repack_halves", 34)])
def test_repacking_writes_nothing_beside_its_result(operation, width):
    words = random_words({"repack_awq": 130}.get(operation, 17), 9)
    size = width * {"repack_awq": 8, "repack_gptq": 1, "repack_halves": 2}[operation] * 9
    memory = torch.full((size + 128,), 0x5A, dtype=torch.uint8)
    more = (0, 4, None) if operation == "repack_gptq" else ()
    library.call(operation, words, words.shape[0], 9, *more, memory[64:])
    assert (memory[:64] == 0x5A).all() and (memory[-64:] == 0x5A).all()


def test_what_cannot_be_repacked_here_goes_another_way(monkeypatch):
    words = random_words(24, 6)
    expected = awq._transposed(words.clone())
    assert not repack.supports(words.T) and not repack.supports(words.long()) and not repack.supports(words.to("meta"))
    assert torch.equal(awq._transposed(words.T.clone().T), expected)
    monkeypatch.setattr(repack, "why_not", lambda: "no compiler")
    assert torch.equal(awq._transposed(words.clone()), expected)
    scales = torch.randn(4, 6).half()
    assert torch.equal(repack.transposed(scales), scales.T)
