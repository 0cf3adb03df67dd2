"""Embeddings of hashed n-grams (PLE of Qwen4-Exp): a table too large to compute with, of which a token reads a few rows.

Every token has one row for each of `heads` hash functions, of the tokens that end in it: the same number of heads for
n = 2, 3, ... up to the n-gram size. With t_s the token s steps back and m_s odd multipliers,

    row = ((t_0 m_0) xor (t_1 m_1) xor ... (t_{n-1} m_{n-1})) mod prime + offset        in 64-bit integers

Each head has a prime of its own, the rows it may use lying behind those of the head before it. A sentence does not look
into the one before it: from the first end-of-sentence token backwards, all tokens count as that token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea & Flood 2014, figure 17): 64 bits of state to 64 bits of noise."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def ngram_multipliers(vocab_size: int, ngram_size: int, index: int, seed: int) -> list[int]:
    """m_0 .. m_{n-1}: odd, and so small that a token's product stays below 2^63. `index`: of the PLE layer among its kind."""
    half = max(1, ((1 << 63) - 1) // max(vocab_size, 1) // 2)
    states = ((seed + 10007 * index + _GAMMA * (i + 1)) & _MASK for i in range(ngram_size))
    return [2 * (splitmix64(state) % half) + 1 for state in states]


def primes_from(start: int, count: int) -> list[int]:
    """The first `count` primes >= start, ascending."""
    found: list[int] = []
    number = max(start, 2)
    while len(found) < count:
        if is_prime(number):
            found.append(number)
        number += 1
    return found


def is_prime(number: int) -> bool:
    """By Miller and Rabin's test with the first 12 primes for bases, which is exact below 2^64 (Sorenson & Webster 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if number < 2 or any(number % p == 0 for p in bases):
        return number in bases
    twos = ((number - 1) & (1 - number)).bit_length() - 1
    for base in bases:
        x = pow(base, (number - 1) >> twos, number)
        powers = [x]
        for _ in range(twos - 1):
            powers.append(powers[-1] ** 2 % number)
        if x != 1 and number - 1 not in powers:
            return False
    return True


def ngram_rows(tokens: Tensor, before: Tensor, multipliers: Tensor, sizes: Tensor, offsets: Tensor, eos: int) -> Tensor:
    """The table's rows of every token, by the formula of this file's docstring.

    Args: tokens (B, T) int64; before (B, n - 1), the tokens before them, `eos` where there are none; multipliers (n,);
    sizes and offsets (heads,) int64, the heads of 2-grams first. Returns (B, T, heads) int64.
    """
    order = multipliers.shape[0]
    history, length = torch.cat((before, tokens), dim=1), tokens.shape[1]  # (B, n - 1 + T)
    back = tokens  # t_0
    mixed = back * multipliers[0]  # (B, T)
    rows = []
    for s, (size, offset) in enumerate(zip(sizes.chunk(order - 1), offsets.chunk(order - 1), strict=True), start=1):
        further = history[:, order - 1 - s : order - 1 - s + length]
        back = further if s == 1 else torch.where(back == eos, eos, further)  # the sentence's own end may be t_0
        mixed = mixed ^ (back * multipliers[s])
        rows.append(mixed[..., None] % size + offset)  # (B, T, heads of this n)
    return torch.cat(rows, dim=-1)


def ngram_gate(key: Tensor, query: Tensor, value: Tensor) -> Tensor:
    """What each stream takes of a token's n-gram value: sigmoid(s) value, where s is the signed square root of
    key . query / sqrt(H), of size 1e-6 at least in the root.

    Args: key, query (..., n, H), both normed; value (..., H). Returns (..., n, H), every step rounded to key's dtype.
    """
    return torch.sigmoid(ngram_match(key, query))[..., None] * value[..., None, :]


def ngram_match(key: Tensor, query: Tensor) -> Tensor:
    """s of `ngram_gate`: (..., n, H) twice -> (..., n)."""
    score = (key * query).sum(-1) / key.shape[-1] ** 0.5
    return score.abs().clamp_min(1e-6).sqrt() * score.sign()


def dilated_conv1d(x: Tensor, weight: Tensor, state: Tensor | None, dilation: int) -> tuple[Tensor, Tensor]:
    """silu of a causal convolution over every `dilation`-th token, each channel by itself:
    y_t = silu(sum_i weight_i x_{t - dilation (W - 1 - i)}).

    Args: x (B, T, C); weight (C, W); state (B, C, (W - 1) dilation), the inputs before x, None = zeros.
    Returns (B, T, C) in x's dtype, which the sum and then silu are rounded to, and the state after x.
    """
    reach = (weight.shape[1] - 1) * dilation
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], reach)
    inputs = torch.cat((state, x.transpose(1, 2)), dim=-1)  # (B, C, reach + T)
    out = F.conv1d(inputs, weight[:, None], groups=weight.shape[0], dilation=dilation)  # (B, C, T)
    return F.silu(out).transpose(1, 2), inputs[:, :, inputs.shape[2] - reach :].clone()  # no view: it would keep x
