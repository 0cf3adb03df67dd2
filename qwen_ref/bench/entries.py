"""The entries of a kernel's tuned table, one after the other in force for all shapes.

An entry that is fast and wrong on shapes of its own class is the usual way a tuned kernel fails: every one is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

Table = dict[Any, dict[str, int]]


def each_entry(operation: str) -> Iterator[dict[str, int]]:
    """Every different entry of the operation's TUNED table, in force while it is yielded."""
    table: Table = import_module(f"qwen_kernels.{operation}").TUNED
    for entry in {json.dumps(entry): entry for entry in table.values()}.values():
        with in_force(table, entry):
            yield entry


@contextmanager
def in_force(table: Table, entry: dict[str, int]) -> Iterator[None]:
    """Every entry with the same parameters is this one."""
    before = dict(table)
    table.update({key: entry for key in before if set(before[key]) == set(entry)})
    try:
        yield
    finally:
        table.update(before)
