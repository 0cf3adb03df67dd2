"""The block types of ggml: how many elements a block has, how many bytes, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {}
