"""Every Qwen in PyTorch you can read, proven layer by layer against transformers.

    import qwen_ref as qr
    model, tokenizer = qr.load("tiny")
    for piece in qr.stream(model, tokenizer, "Once upon a time"): print(piece.text, end="")
"""

from importlib import import_module
from typing import Any

from . import backend, ops
from .errors import QwenRefError
from .generate import Piece, Result, Session, generate, stream
from .loading import load
from .quantize import quantize
from .retrieval import embed, rerank
from .score import score
from .tokenizer import Tokenizer
from .verify import verify

__version__ = "0.1.0"

_ON_DEMAND = ("plot", "study")  # imported when they are named


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Piece",
    "QwenRefError",
    "Result",
    "Session",
    "Tokenizer",
    "backend",
    "embed",
    "generate",
    "load",
    "ops",
    "plot",
    "quantize",
    "rerank",
    "score",
    "stream",
    "study",
    "verify",
]
