"""Which precision the formulas compute in."""

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    # fp64 runs are the oracle of the half-precision ones and must not be rounded to fp32 on the way.
    return torch.promote_types(dtype, torch.float32)
