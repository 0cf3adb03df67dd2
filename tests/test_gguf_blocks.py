"""ggml's blocks against the `gguf` package of llama.cpp, which defines them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from qwen_ref.errors import CheckpointError
from qwen_ref.quant.gguf import repack
from qwen_ref.quant.gguf_blocks import BLOCK, DEQUANTIZE, GRIDS, grid
from qwen_ref.quant.gguf_quantize import QUANTIZE, quantize
from qwen_ref.quant.packed import Code4, Gguf, Int4, Int8, expert, rows


def theirs(kind: str, blocks: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind]))


def random_blocks(kind: str, shape: tuple[int, ...], finite: bool = False) -> torch.Tensor:
    """Random bytes, or bytes whose scales are numbers; of NVFP4 the scales have no sign, which is undefined."""
    elements, size = BLOCK[kind]
    generator = torch.Generator().manual_seed(len(kind))
    b = torch.randint(0, 256, (*shape[:-1], shape[-1] // elements, size), dtype=torch.uint8, generator=generator)
    if kind == "NVFP4":
        b[..., :4] &= 0x7E if finite else 0x7F
    elif finite and kind == "MXFP4":
        b[..., 0] &= 0x7F
    elif finite:  # the high byte of every fp16 scale
        for at in {"Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,), "Q8_0": (1,), "Q4_0": (1,), "Q5_0": (1,),
                   **{name: (1,) for name in BLOCK if name[:2] == "IQ"}, "IQ1_M": (55,)}.get(kind, (1, 3)):  # fmt: skip
            b[..., at] &= 0xBF
    return b.flatten(-2)


@pytest.mark.parametrize("kind", BLOCK)
def test_every_kind_is_what_its_library_says(kind):
    elements, size = BLOCK[kind]
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (elements, size)
    blocks = random_blocks(kind, (7, 3 * elements))
    ours = DEQUANTIZE[kind](blocks)
    assert ours.dtype == torch.float32 and ours.shape == (7, 3 * elements)
    torch.testing.assert_close(ours, theirs(kind, blocks), rtol=0, atol=0, equal_nan=True)


def test_grids_are_those_of_the_library():
    for kind in GRIDS:
        known = gguf.quants._type_traits[GGMLQuantizationType[kind]]
        known.init_grid()
        assert torch.equal(grid(kind).float(), torch.from_numpy(known.grid)[0, 0])


@pytest.mark.parametrize("kind", BLOCK)
def test_leading_axes_and_slices(kind):
    blocks = random_blocks(kind, (3, 5, 2 * BLOCK[kind][0]), finite=True)
    whole = DEQUANTIZE[kind](blocks)
    assert torch.equal(DEQUANTIZE[kind](blocks[1, 2]), whole[1, 2])
    assert torch.equal(DEQUANTIZE[kind](blocks.transpose(0, 1)), whole.transpose(0, 1))
    odd = torch.cat((torch.zeros(1, dtype=torch.uint8), blocks.flatten()))[1:].view(blocks.shape)  # at an odd address
    assert torch.equal(DEQUANTIZE[kind](odd), whole)


@pytest.mark.parametrize("kind", BLOCK)
@pytest.mark.parametrize("chunk", [1, 400, 1 << 18])
def test_repacking_loses_nothing(monkeypatch, kind, chunk):
    monkeypatch.setattr("qwen_ref.quant.gguf._CHUNK_BYTES", chunk)
    elements = BLOCK[kind][0]
    blocks = random_blocks(kind, (2, 5, 3 * elements), finite=True)
    packed = repack(kind, blocks)
    layout = {"Q8_0": Int8, "Q5_0": Int8, "Q4_0": Int4, "IQ4_NL": Code4, "MXFP4": Code4, "NVFP4": Code4}.get(kind, Gguf)
    assert type(packed) is layout
    expected = theirs(kind, blocks)
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(rows(expert(packed, 1), 1, 4).dequantize(), expected[1, 1:4])
    wide = packed.dequantize(torch.float64)
    torch.testing.assert_close(wide.float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", BLOCK)
def test_a_scale_that_is_no_number_is_refused(kind):
    blocks = random_blocks(kind, (3, 2 * BLOCK[kind][0]), finite=True)
    broken = blocks.unflatten(-1, (2, -1))
    if kind in ("MXFP4", "NVFP4"):
        broken[2, 1, 0] = 0xFF
    elif kind == "IQ1_M":
        broken[2, 1, 49::2] |= 0xF0
    else:
        low = {"Q2_K": 82, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
        broken[2, 1, low : low + 2] = torch.tensor([0, 0x7E], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=f"{kind} block has a scale that is NaN"):
        repack(kind, blocks)


def weights() -> torch.Tensor:
    """Rows of several spreads and shapes: zeros, one value, one sign, ties of both signs, heavy tails."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(37, 768, generator=generator) * torch.rand(37, 1, generator=generator).exp() * 0.02
    x[1], x[2, :64], x[3, :32] = 0, 0.5, -0.25
    x[4], x[5] = x[4].abs(), -x[5].abs()
    x[6, ::2] = -x[6, 1::2]
    x[7] = x[7] ** 3 * 1e4
    return x


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_simple_kinds_are_written_byte_for_byte_as_by_their_library(kind, dtype):
    x = weights().to(dtype)
    expected = gguf.quants.quantize(x.float().numpy(), GGMLQuantizationType[kind])
    assert np.array_equal(quantize(kind, x).numpy(), expected)


def test_chunks_and_leading_axes_make_no_difference(monkeypatch):
    x = weights()[:6].view(2, 3, 768)
    whole = {kind: quantize(kind, x) for kind in QUANTIZE}
    monkeypatch.setattr("qwen_ref.quant.gguf_quantize._CHUNK", 1024)
    for kind, blocks in whole.items():
        assert blocks.shape == (2, 3, 768 // BLOCK[kind][0] * BLOCK[kind][1])
        assert torch.equal(quantize(kind, x), blocks) and torch.equal(quantize(kind, x[1, 2]), blocks[1, 2])


def fitted(x: torch.Tensor, group: int, levels: int, symmetric: bool) -> torch.Tensor:
    """Rounded between the least and the largest value of every group, with exact scales."""
    groups = x.unflatten(-1, (-1, group))
    low = torch.zeros(()) if symmetric else groups.amin(-1, keepdim=True)
    step = (groups.abs().amax(-1, keepdim=True) if symmetric else groups.amax(-1, keepdim=True) - low) / levels
    return (((groups - low) / step.clamp(min=1e-30)).round() * step + low).flatten(-2)


@pytest.mark.parametrize("kind,group,levels,symmetric", [("Q4_K", 32, 15, False), ("Q6_K", 16, 31, True)])
@pytest.mark.parametrize("spread", ["normal", "student", "uniform"])
def test_k_kinds_are_nearer_than_a_fit_of_the_extremes(kind, group, levels, symmetric, spread):
    """Although their own scales have six or eight bits: in every distribution at least 5 % less error."""
    torch.manual_seed(0)
    shape = (33, 1024)
    x = {"normal": torch.randn(shape), "student": torch.distributions.StudentT(4.0).sample(shape),
         "uniform": torch.rand(shape) - 0.3}[spread] * 0.02  # fmt: skip
    error = (theirs(kind, quantize(kind, x)) - x).norm()
    assert error < 0.95 * (fitted(x, group, levels, symmetric) - x).norm()


@pytest.mark.parametrize("kind,bound", [("Q4_K", 1 / 15), ("Q6_K", 1 / 31)])
def test_no_element_of_a_k_kind_is_far_off(kind, bound):
    """Within 1.5 steps of its block's range, blocks of zeros, one value or one sign included."""
    x = weights()
    blocks = x.unflatten(-1, (-1, 256))
    reach = torch.maximum(blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0), torch.zeros(()))
    error = (theirs(kind, quantize(kind, x)) - x).unflatten(-1, (-1, 256)).abs().amax(-1)
    assert (error <= 1.5 * bound * reach + 1e-8).all()


@pytest.mark.parametrize("kind", QUANTIZE)
def test_what_cannot_be_scaled_is_refused(kind):
    x = torch.zeros(3, 256)
    for value in (torch.nan, torch.inf, -1e5):
        x[2, 7] = value
        with pytest.raises(CheckpointError, match="NaN, infinite or beyond fp16"):
            quantize(kind, x)
    with pytest.raises(CheckpointError, match="whole blocks"):
        quantize(kind, torch.zeros(2, 40))
    with pytest.raises(CheckpointError, match="Q3_K cannot be written"):
        quantize("Q3_K", torch.zeros(2, 256))
