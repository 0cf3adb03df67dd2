"""A swiglu in Triton whose masks were forgotten, for `qwen-ref kernels check swiglu --impl no_mask --file tests/no_mask.py`."""

import torch
import triton
import triton.language as tl

from qwen_ref import backend


@triton.jit
def kernel(gate, up, out, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    g = tl.load(gate + tl.program_id(0) * width + column).to(tl.float32)
    u = tl.load(up + tl.program_id(0) * width + column).to(tl.float32)
    tl.store(out + tl.program_id(0) * width + column, g / (1 + tl.exp(-g)) * u)


@backend.register("swiglu", "no_mask")
def run(gate, up):
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        kernel[(out.numel() // out.shape[-1],)](gate, up, out, out.shape[-1], BLOCK=triton.next_power_of_2(out.shape[-1]))
    return out
