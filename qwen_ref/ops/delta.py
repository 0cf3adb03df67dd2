"""Linear attention whose memory is written to by the gated delta rule: Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464).

A head keeps a matrix S (Dk, Dv) in place of all keys and values. A token reads what S holds under its key, and writes back
the difference to its value:

    S <- exp(g_t) S                            decay, one number per head
    S <- S + k_t (beta_t (v_t - S^T k_t))^T    the delta rule: of the error, the share beta
    o_t = S^T q_t

More letters: G key heads, P value heads (G divides P; value head j reads with key head j // (P/G)), Dk and Dv their
dimensions, C channels of the convolution, W its width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import at_least_fp32
from .norms import gated_rms_norm, l2_norm

CHUNK = 64


def causal_conv1d(x: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """silu of a convolution over time, every channel by itself: y_t = silu(sum_i weight_i x_{t-W+1+i}).

    Args: x (B, T, C); weight (C, W); state (B, C, W), the W inputs before x, None = zeros.
    Returns (B, T, C) in x's dtype, which the sum and then silu are rounded to, and the state after x.
    """
    width = weight.shape[1]
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], width)
    inputs = torch.cat((state, x.transpose(1, 2)), dim=-1)  # (B, C, W + T)
    out = F.conv1d(inputs, weight[:, None], groups=weight.shape[0])[:, :, 1:]  # (B, C, T): the first is the last token before x
    return F.silu(out).transpose(1, 2), inputs[:, :, inputs.shape[2] - width :].clone()  # no view: it would keep x


def delta_gates(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """(g, beta) of each token and value head: g = -exp(A_log) softplus(a + dt_bias), the logarithm of the decay, and
    beta = sigmoid(b), the share of the error that is written.

    Args: a, b (B, T, P); a_log, dt_bias (P,). g is at least fp32: decays multiply up over thousands of tokens. beta is
    rounded to b's dtype.
    """
    wide = at_least_fp32(a.dtype)
    return -a_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias), b.sigmoid()


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rule of this file's docstring, token by token. q and k are scaled to length one first, q also by 1/sqrt(Dk).

    Args: q, k (B, T, G, Dk); v (B, T, P, Dv); g, beta (B, T, P) from `delta_gates`; state S (B, P, Dk, Dv), None = zeros.
    Returns o (B, T, P, Dv) in v's dtype and the state after it, at least fp32. Everything between is at least fp32.
    """
    wide, dtype = at_least_fp32(v.dtype), v.dtype
    q, k = unit_queries_keys(q, k, v.shape[2])  # (B, T, P, Dk)
    v, beta, decay = v.to(wide), beta.to(wide), g.to(wide).exp()
    memory = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if state is None else state.to(wide)
    out = torch.empty_like(v)
    for t in range(v.shape[1]):
        memory = memory * decay[:, t, :, None, None]  # (B, P, Dk, Dv)
        held = torch.einsum("bpkv,bpk->bpv", memory, k[:, t])
        error = beta[:, t, :, None] * (v[:, t] - held)  # (B, P, Dv)
        memory = memory + k[:, t, :, :, None] * error[:, :, None]
        out[:, t] = torch.einsum("bpkv,bpk->bpv", memory, q[:, t])
    return out.to(dtype), memory


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` in chunks of tokens, with matrix products inside a chunk and a loop over chunks only.

    Within a chunk, with s the running sum of g and D_ij = exp(s_i - s_j) for j <= i, what the tokens write, U (one row
    each), depends on what those before them wrote: (I + L) U = beta V - beta exp(s) K S with L = tril(beta K K^T D, -1),
    one triangular system for all of them (the "UT transform" of Yang et al. 2024, arXiv 2406.06484, section 3.2). Then

        O = exp(s) Q S + tril(Q K^T D) U        S <- exp(s_last) S + (exp(s_last - s) K)^T U
    """
    wide, dtype, length = at_least_fp32(v.dtype), v.dtype, v.shape[1]
    q, k = unit_queries_keys(q, k, v.shape[2])
    pad = -length % chunk  # padded tokens write nothing (beta 0) and do not decay (g 0)
    q, k, v = (_in_chunks(x.to(wide), pad, chunk) for x in (q, k, v))  # (B, P, N, chunk, D)
    g, beta = (_in_chunks(x.to(wide)[..., None], pad, chunk) for x in (g, beta))  # (B, P, N, chunk, 1)
    memory = v.new_zeros(*v.shape[:2], k.shape[4], v.shape[4]) if state is None else state.to(wide)
    s = g.double().cumsum(3)  # (B, P, N, chunk, 1); in fp64, for it is differences that count, beside decays to nothing too
    decay = decay_between(s, wide)  # (B, P, N, chunk, chunk)
    into, out_of, last = (x.to(wide).exp() for x in (s, s[..., -1:, :] - s, s[..., -1, :, None]))
    system = (beta * k @ k.mT * decay).tril(-1)  # (B, P, N, chunk, chunk)
    rhs = torch.cat((beta * v, beta * into * k), dim=-1)
    values, reads = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True).split(
        (v.shape[4], k.shape[4]), dim=-1
    )
    pattern = q @ k.mT * decay  # (B, P, N, chunk, chunk)
    into, out_of = into * q, out_of * k
    outs = []
    for n in range(v.shape[2]):
        written = values[:, :, n] - reads[:, :, n] @ memory  # (B, P, chunk, Dv)
        outs.append(into[:, :, n] @ memory + pattern[:, :, n] @ written)
        memory = last[:, :, n] * memory + out_of[:, :, n].mT @ written
    out = torch.stack(outs, 2).flatten(2, 3)[:, :, :length] if outs else v.flatten(2, 3)  # (B, P, T, Dv)
    return out.transpose(1, 2).to(dtype), memory


def gated_delta_step(
    mixed: Tensor, window: Tensor, conv_weight: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
    z: Tensor, norm_weight: Tensor, eps: float, state: Tensor, activation: str = "silu",
) -> Tensor:  # fmt: skip
    """All that stands between the projections of one token and the output projection: `causal_conv1d`, `delta_gates`,
    `gated_delta_rule` and `gated_rms_norm`, which a kernel can do in one pass over the state.

    Writes window and state as they are after the token over what they were before it: the state is most of what a token
    reads, and in its own place it needs no new memory, also in a recorded step or a CUDA graph.

    Args: mixed (B, C), q|k|v; window (B, C, W) and conv_weight (C, W) of the convolution; a, b (B, P), a_log, dt_bias (P,);
    z (B, P, Dv) the gate, norm_weight (Dv,), eps and activation of the norm; state S (B, P, Dk, Dv), at least fp32.
    C = 2 G Dk + P Dv. Returns the normed output (B, P Dv) in mixed's dtype.
    """
    (heads, width), dim = z.shape[1:], state.shape[2]
    keys = (mixed.shape[1] - heads * width) // 2  # G Dk
    conved, window_after = causal_conv1d(mixed[:, None], conv_weight, window)  # (B, 1, C), (B, C, W)
    q, k, v = conved.split((keys, keys, heads * width), dim=-1)
    q, k, v = q.unflatten(-1, (-1, dim)), k.unflatten(-1, (-1, dim)), v.unflatten(-1, (heads, width))
    out, state_after = gated_delta_rule(q, k, v, *delta_gates(a[:, None], b[:, None], a_log, dt_bias), state)  # (B, 1, P, Dv)
    window.copy_(window_after)
    state.copy_(state_after)
    return gated_rms_norm(out[:, 0], z, norm_weight, eps, activation).flatten(1)


def gated_delta_pattern(q: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """What `gated_delta_rule` amounts to as attention: A (B, P, T, T) with o = A v for a state that begins at zero.

    Exact, by the triangular form of one chunk that holds all tokens: A = tril(Q K^T D) (I + L)^-1 diag(beta). Rows do not
    sum to one and entries may be negative. Arguments as there; at least fp32.
    """
    wide = at_least_fp32(k.dtype)
    q, k = (x.transpose(1, 2) for x in unit_queries_keys(q, k, g.shape[2]))  # (B, P, T, Dk)
    s, beta = (x.transpose(1, 2)[..., None] for x in (g.double().cumsum(1), beta.to(wide)))  # (B, P, T, 1)
    decay = decay_between(s, wide)
    system = (beta * k @ k.mT * decay).tril(-1)
    return torch.linalg.solve_triangular(system, q @ k.mT * decay, upper=False, unitriangular=True, left=False) * beta.mT


def unit_queries_keys(q: Tensor, k: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """q / (|q| sqrt(Dk)) and k / |k|, each key head repeated for its value heads: 2 x (B, T, P, Dk), at least fp32."""
    q, k = (l2_norm(x.to(at_least_fp32(x.dtype))).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k


def decay_between(s: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(s_i - s_j) for j <= i, zero above: what is left at token i of a write at token j. (..., T, 1) -> (..., T, T)."""
    later = torch.ones(s.shape[-2], s.shape[-2], dtype=torch.bool, device=s.device).triu(1)
    return (s - s.mT).to(dtype).masked_fill(later, -torch.inf).exp()  # masked before exp, which could overflow there


def _in_chunks(x: Tensor, pad: int, chunk: int) -> Tensor:
    """(B, T, P, D) -> (B, P, N, chunk, D), zeros appended."""
    return F.pad(x.transpose(1, 2), (0, 0, 0, pad)).unflatten(2, (-1, chunk))
