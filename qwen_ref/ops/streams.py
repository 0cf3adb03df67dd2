"""Hyper-connections: a residual stream in n parallel copies (Zhu et al. 2024, arXiv 2409.19606, section 2; Qwen4-Exp's form).

A sub-layer f does not see the n streams themselves. It reads a mixture of their norms N_s and writes its one result back
to each of them, all weights being functions of the token:

    u = mean_s(sigmoid(m_s) * N_s)         m_s (H,): a weight for every number of every stream
    X_s <- X_s + 2 sigmoid(b_s / n) f(u)   b_s: one number for each stream

m and b are linear in the n norms side by side. More letters: n streams.
"""

import torch
from torch import Tensor


def stream_mix(normed: Tensor, logits: Tensor) -> Tensor:
    """What a sub-layer reads: mean over the streams s of sigmoid(logits_s) * normed_s.

    Args: normed, logits (..., n, H). Returns (..., H) in normed's dtype, to which sigmoid and product are rounded; the mean
    is summed in at least fp32.
    """
    return (torch.sigmoid(logits) * normed).mean(dim=-2)


def stream_write(x: Tensor, out: Tensor, logits: Tensor) -> Tensor:
    """What a sub-layer leaves behind: x_s + 2 sigmoid(logits_s / n) out in every stream s.

    Args: x (..., n, H); out (..., H); logits (..., n). Returns (..., n, H) in x's dtype, every step rounded to it.
    """
    return x + stream_gain(logits)[..., None] * out[..., None, :]


def stream_gain(logits: Tensor) -> Tensor:
    """2 sigmoid(logits / n): how strongly each of n streams takes a sub-layer's output; 1 at zero. (..., n) -> (..., n)."""
    return 2 * torch.sigmoid(logits / logits.shape[-1])
