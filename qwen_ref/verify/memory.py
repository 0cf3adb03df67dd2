"""Whether both sides fit: bytes a comparison takes, and bytes there are."""

from __future__ import annotations

from pathlib import Path

import torch

from ..models.common import LanguageModel
from .levels import HALF


def needed(model: LanguageModel, dtype: torch.dtype, live: bool, relations: bool) -> int:
    """Bytes of weights: ours, transformers' if it runs live, in half precision its fp32 run and our fp32 copy for L5.

    Activations are not counted: one prompt's at a time, and small beside the weights of a model for which this matters.
    """
    half, fp32 = dtype in HALF, torch.float32.itemsize
    each = dtype.itemsize * (1 + live) + (fp32 * (live + relations) if half else 0)
    return model.num_parameters() * each


def available(device: torch.device) -> int | None:
    """Free bytes on a device; None where nothing says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [n for n in (_meminfo(), _cgroup()) if n is not None]
    return min(free, default=None)


def _meminfo() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup() -> int | None:
    """What a container's limit leaves; pages of files do not count as used, the kernel gives them back."""
    folder = Path("/sys/fs/cgroup")
    limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
    if not limit or not used or not limit[0].isdigit():
        return None
    files = next((int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")), 0)
    return int(limit[0]) - int(used[0]) + files


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
