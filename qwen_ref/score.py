"""What quantising costs and saves: perplexity, distance from the unquantised model, memory and speed, format by format.

    print(score("tiny", text=stories, formats=["int8", "int4", "int4:gptq"]).table())

Perplexity is exp of the mean negative log-likelihood of a token, every token of the text counting alike. The text is cut
into documents at `<|endoftext|>`; each is read after one, as in training, and the one at its end is predicted too. A
document longer than the window is read in windows that overlap by half: every token is predicted once, after at least
half a window of context (after all there is, in the first).

The distance is KL(reference || model), the mean over the same tokens and the 99th percentile, and the share of tokens
where both find the same token most likely.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .describe import size
from .errors import NumericsError, RequestError
from .loading import load
from .models.common import LanguageModel
from .quant.calibrated import quantize_model, windows_of
from .quant.making import KINDS
from .quantize import CALIBRATION
from .tokenizer import Tokenizer

WINDOW = 2048
DECODED = 32  # tokens, for the speed
REPEATS = 3
GPTQ = "int4:gptq"
SEPARATOR = "<|endoftext|>"
_MOST_LOSS = 700.0  # nats a token, whose exponential is a number
_CHUNK_BYTES = 1 << 26  # of fp32 logits at a time: a whole window's, with 150,000 tokens to choose from, would be 1.2 GB


@dataclass(frozen=True)
class Row:
    """One format. What compares with the reference is None for the reference itself."""

    format: str
    perplexity: float
    kl_mean: float | None  # nats a token
    kl_p99: float | None
    top1: float | None
    weight_bytes: int
    prefill: float  # tokens a second
    decode: float


@dataclass(frozen=True)
class Score:
    model: str
    tokens: int  # predicted
    documents: int
    window: int
    device: str
    dtype: str
    threads: int
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """For a terminal, and readable as Markdown."""
        first, wide = self.rows[0], max(10, *(len(row.format) for row in self.rows))
        lines = [
            f"{self.model}: {self.tokens:,} tokens of {self.documents} documents, windows of {self.window}, {self.dtype} on "
            f"{self.device}, {self.threads} threads",
            "",
            f"| {'format':{wide}} | perplexity |   change | KL mean | KL p99 | same top-1 |   weights | prefill tok/s | "
            "decode tok/s |",
            f"|{'-' * wide}--|-----------:|---------:|--------:|-------:|-----------:|----------:|--------------:|"
            "-------------:|",
        ]
        for row in self.rows:
            change = f"{row.perplexity / first.perplexity - 1:+.3%}" if row is not first else ""
            kl = [f"{value:.4f}" if value is not None else "" for value in (row.kl_mean, row.kl_p99)]
            top1 = f"{row.top1:.2%}" if row.top1 is not None else ""
            lines.append(f"| {row.format:{wide}} | {row.perplexity:10.4f} | {change:>8} | {kl[0]:>7} | {kl[1]:>6} | "
                         f"{top1:>10} | {size(row.weight_bytes):>9} | {row.prefill:13,.0f} | {row.decode:12,.1f} |")
        return "\n".join(lines)


class Window(NamedTuple):
    ids: list[int]
    first: int  # the position from which on tokens are predicted: ids[first:] are the targets


def score(
    model: str | Path,
    text: str,
    *,
    against: str | Path | None = None,
    formats: Sequence[str] = (),
    calibration: str | None = None,
    window: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> Score:
    """Measure a model on a text, and what each of several formats makes of it.

    Args:
        model: a bundled name, a folder or a hub id.
        against: the unquantised model it is compared with; without it, `model` is the reference of the formats.
        formats: made from `model` on the spot: kinds of `quant.making`, and "int4:gptq", which reads `calibration`.
        window: tokens; default the smaller of 2048 and what the model was made for.
    Raises: RequestError for a text without tokens, a window out of range, unknown formats, and two models with different
        vocabularies; NumericsError if a model answers with NaN.
    """
    if unknown := [name for name in formats if name not in (*KINDS, GPTQ)]:
        raise RequestError(f"cannot quantise to {unknown[0]!r}; there are {', '.join((*KINDS, GPTQ))}")
    reference, tokenizer = load(model if against is None else against, device=device, dtype=dtype, progress=progress)
    if window is None:
        window = min(WINDOW, reference.config.max_position_embeddings)
    if type(window) is not int or not 2 <= window <= reference.config.max_position_embeddings:
        raise RequestError(f"window is {window!r}; it must be from 2 to {reference.config.max_position_embeddings}, the "
                           "positions the model was made for")
    documents = split(text, tokenizer)
    windows = [piece for ids, scored in documents for piece in cut(ids, scored, window)]
    count = sum(len(piece.ids) - piece.first for piece in windows)
    if not count:
        raise RequestError("the text holds nothing to predict: it needs at least two tokens")
    measure = _Measure(reference, windows, progress)
    rows = [measure.row("reference" if against else str(reference.dtype).removeprefix("torch."), reference)]
    if against is not None:
        other, its_tokenizer = load(model, device=device, dtype=dtype, progress=progress)
        if its_tokenizer.encode(text[:1000]) != tokenizer.encode(text[:1000]):
            raise RequestError(f"{model} and {against} cut the text into different tokens; they cannot be compared")
        rows.append(measure.row(_method(other), other))
        del other
    for name in formats:
        rows.append(measure.row(name, _made(model, name, calibration, device, dtype, progress)))
    return Score(str(model), count, len(documents), window, str(reference.device),
                 str(reference.dtype).removeprefix("torch."), torch.get_num_threads(), rows)


def split(text: str, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """Documents as ids, and the position of the first that is predicted: 1, after the separator or the first token."""
    separator = tokenizer.id_of(SEPARATOR)
    parts = text.split(SEPARATOR)
    documents = []
    for i, part in enumerate(parts):
        ids = tokenizer.encode(part)
        ended = i < len(parts) - 1
        if ids:
            before = [separator] if separator is not None else []
            documents.append(([*before, *ids, *(before if ended else [])], 1))
    return documents


def cut(ids: list[int], first: int, window: int) -> Iterator[Window]:
    """Windows of a document, overlapping by half, in which every token from `first` on is predicted once."""
    start, done = 0, first
    while done < len(ids):
        end = min(start + window, len(ids))
        yield Window(ids[start:end], done - start)
        start, done = end - window // 2, end


class _Measure:
    """Models, one after the other, on the same windows beside the same reference."""

    def __init__(self, reference: LanguageModel, windows: list[Window], progress: bool) -> None:
        self.reference, self.windows, self.progress = reference, windows, progress

    @torch.inference_mode()
    def row(self, name: str, model: LanguageModel) -> Row:
        from tqdm import tqdm

        if model.config.vocab_size != self.reference.config.vocab_size:
            raise RequestError(f"{name} chooses from {model.config.vocab_size} tokens, the reference from "
                               f"{self.reference.config.vocab_size}: they cannot be compared")
        same = model is self.reference
        losses, distances, agreed = [], [], 0
        for piece in tqdm(self.windows, desc=name, delay=1, disable=not self.progress):
            for loss, distance, agree in self._compare(model, piece, same):
                losses.append(loss)
                distances.append(distance)
                agreed += agree
        loss, distance = torch.cat(losses).double(), torch.cat(distances).double()
        if not bool(torch.isfinite(loss).all()):
            raise NumericsError(f"{name} gives NaN or infinite logits")
        if (worst := loss.mean().item()) > _MOST_LOSS:
            raise NumericsError(f"{name} loses {worst:.0f} nats a token: its perplexity is no number; is it damaged?")
        prefill, decode = speed(model, max(self.windows, key=lambda piece: len(piece.ids)).ids)
        mean, p99 = (None, None) if same else (distance.mean().item(), _percentile(distance, 0.99))
        top1 = None if same else agreed / len(loss)
        return Row(name, math.exp(loss.mean().item()), mean, p99, top1, model.weight_bytes(), prefill, decode)

    def _compare(self, model: LanguageModel, piece: Window, same: bool) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Loss of every predicted token, KL from the reference, and how many top-1 agree; some tokens at a time."""
        ids = torch.tensor([piece.ids], device=model.device)
        targets = ids[0, piece.first :]
        hidden = model.model(ids[:, :-1])[0, piece.first - 1 :]  # (M, H)
        theirs = hidden if same else self.reference.model(ids[:, :-1])[0, piece.first - 1 :]
        step = max(1, _CHUNK_BYTES // (4 * model.config.vocab_size))
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            logits = model.lm_head(hidden[part]).float()  # (m, V)
            loss = backend.cross_entropy(logits, targets[part])
            if same:
                yield loss, torch.zeros_like(loss), len(loss)
                continue
            wanted = self.reference.lm_head(theirs[part]).float().log_softmax(-1)
            distance = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
            yield loss, distance.clamp(min=0), int((wanted.argmax(-1) == logits.argmax(-1)).sum())


def speed(model: LanguageModel, ids: list[int]) -> tuple[float, float]:
    """Tokens a second, median of three: reading `ids` at once, and one by one after them."""
    given = torch.tensor([ids], device=model.device)
    prefill, decode = [], []
    for _ in range(REPEATS + 1):  # the first is to warm up
        cache, start = model.make_cache(), _now(given.device)
        model(given, cache=cache)
        read = _now(given.device)
        for _ in range(DECODED):
            model(given[:, -1:], cache=cache)
        prefill.append(read - start)
        decode.append(_now(given.device) - read)
    return len(ids) / statistics.median(prefill[1:]), DECODED / statistics.median(decode[1:])


def _now(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _made(model: str | Path, name: str, calibration: str | None, device: str | None, dtype: str | None, progress: bool) -> Any:
    if name != GPTQ:
        return load(model, device=device, dtype=dtype, quantize=name, progress=progress)[0]
    network, tokenizer = load(model, device=device, dtype=dtype, progress=progress)
    text = calibration if calibration is not None else CALIBRATION.read_text(encoding="utf-8")
    return quantize_model(network, windows_of(tokenizer.encode(text, allow_special=True)))[0]


def _method(model: LanguageModel) -> str:
    return str((model.raw_config.get("quantization_config") or {}).get("quant_method", model.dtype)).removeprefix("torch.")


def _percentile(values: Tensor, share: float) -> float:
    return values.sort().values[min(len(values) - 1, math.ceil(share * len(values)) - 1)].item()
