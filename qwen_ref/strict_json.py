"""JSON from files that nobody vouches for, read strictly: UTF-8, no key twice, finite numbers, bounded size and depth."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError, QwenRefError
from .limits import LIMITS


def read_json(
    path: Path, error: type[QwenRefError] = CheckpointError, limit: int = LIMITS.config_bytes
) -> dict[str, Any]:
    """A JSON object from a file: UTF-8 without BOM, no duplicate keys, finite numbers, bounded size and depth."""
    if not os.path.isfile(path):  # False, where Path.is_file raises, for a name the system cannot hold
        raise error(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}") from problem
    if len(raw) > limit:
        raise error(f"{path}: a file of this kind has at most {limit:,} bytes")
    return parse_object(raw, str(path), error)


def parse_object(raw: bytes, where: str, error: type[QwenRefError]) -> dict[str, Any]:
    """Strict JSON that is an object. `where` names the source in messages."""
    value = parse_json(raw, where, error)
    if not isinstance(value, dict):
        raise error(f"{where}: holds a {type(value).__name__}, not a JSON object")
    return value


def parse_json(raw: bytes, where: str, error: type[QwenRefError]) -> Any:
    """Strict JSON. `where` names the source in messages."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise error(f"{where}: the key {quote(twice)} stands twice")
        return result

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise error(f"{where}: the number {text:.80} is not finite")
        return value

    def integer(text: str) -> int | float:
        return -0.0 if text == "-0" else int(text)  # to JSON -0 is a float, which is no size; int() would give 0

    if raw.startswith(b"\xef\xbb\xbf"):
        raise error(f"{where}: begins with a byte order mark; save it as UTF-8 without BOM")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=finite,
            parse_int=integer,
        )
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 (byte {problem.start})") from problem
    except QwenRefError:  # some of them are ValueErrors
        raise
    except RecursionError as problem:
        raise error(f"{where}: nested deeper than {LIMITS.config_depth}") from problem
    except ValueError as problem:  # JSONDecodeError, and integers of more digits than Python converts
        raise error(f"{where}: not valid JSON: {str(problem)[:200]}") from problem
    if _depth(value) > LIMITS.config_depth:
        raise error(f"{where}: nested deeper than {LIMITS.config_depth}")
    return value


def quote(value: object, limit: int = 120) -> str:
    """Something from an untrusted file, short enough and safe to print."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below
        if depth > LIMITS.config_depth:
            break
    return depth


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"{path.name} cannot be written as JSON: {problem}") from problem
    path.write_text(text + "\n", encoding="utf-8")
