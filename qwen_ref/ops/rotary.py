"""Rotary position embedding."""

import math

import torch
from torch import Tensor

from .norms import rms_norm, zero_centred_rms_norm


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Rotary angular frequencies theta^(-2j/D), j < D/2, radians per position (Su et al. 2021). (D/2,) fp32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim)


def yarn_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    original_context: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """YaRN's frequencies (Peng et al. 2023, section 3.2, "NTK by parts"). (D/2,) fp32.

    Frequencies that turn more than `beta_fast` times within the original context stay as they are, those that turn
    less than `beta_slow` times are divided by `factor` (position interpolation), a linear ramp joins the two.
    """

    def index_of(turns: float) -> float:  # the j whose frequency makes this many turns in the original context
        return head_dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the official guard against a ramp of zero width
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    # The interpolated frequency is 1/(factor * theta^..), not (1/theta^..)/factor: one fp32 rounding differs.
    period = theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    kept = 1 - ramp
    return (1.0 / (factor * period)) * (1 - kept) + (1.0 / period) * kept  # 1 - (1 - ramp), rounded twice, as the official code


def ntk_alpha(length: int, trained: int) -> int:
    """Qwen 1's dynamic NTK: by which alpha the rotary base grows, theta alpha^(D/(D-2)), for a prompt of `length` tokens.

    max(1, 2^ceil(log2(length / trained) + 1) - 1): 1 up to the `trained` length, 3 up to twice that, 7 up to four times.
    """
    return max(1, 2 ** math.ceil(math.log(length / trained, 2) + 1) - 1)


def rope_tables(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each frequency twice: (B, T, D) in `dtype`.

    `positions` (B, T) integers, `frequencies` (D/2,) or (B, 1, D/2) fp32. Angles and the attention `scale` of YaRN are fp32;
    the tables are rounded to the activation dtype, where the rotation itself then runs.
    """
    angles = positions[..., None].float() * frequencies  # (B, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, T, D)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_j, x_{j+R/2}) of every head by the position's angles ("half-split" convention).

    x (B, N, T, D); cos, sin (B, T, R). R < D rotates the first R numbers of a head and leaves the others as they are
    ("partial rotary"). Returns (B, N, T, D). Runs in x's dtype, as the official model does.
    """
    cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, R)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    centred: bool = False,
) -> Tensor:
    """All that stands between the projections and the attention: norm q and k per head, rotate them, store k and v.

    Writes to the caches, which is where its results belong.

    Args:
        q (M, N, D); k, v (M, K, D): the projections' rows. q_weight, k_weight (D,): `rms_norm` of every head, or, `centred`,
            `zero_centred_rms_norm`; None where the generation has none.
        cos, sin (M, R): `rope_tables` of each token's position; R < D leaves the end of a head as it is, see `rope`.
        k_cache, v_cache (P, K, S, D): P sequences of S tokens, or P pages of S tokens of a paged cache.
        slots (M,) int64: token m is stored as entry slots[m] % S of cache row slots[m] // S; negative = not at all.
    Returns the rotated q, (M, N, D).
    """
    norm = zero_centred_rms_norm if centred else rms_norm
    if q_weight is not None:
        q = norm(q, q_weight, eps)
    if k_weight is not None:
        k = norm(k, k_weight, eps)
    q, k = (rope(x[:, :, None], cos[:, None], sin[:, None])[:, :, 0] for x in (q, k))  # every token a batch of one
    kept = torch.where(slots >= 0)[0]
    row, entry = slots[kept] // k_cache.shape[2], slots[kept] % k_cache.shape[2]
    k_cache[row, :, entry] = k[kept]
    v_cache[row, :, entry] = v[kept]
    return q
