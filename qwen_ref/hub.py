"""A folder, or a hub id downloaded into the hub's cache -> a folder."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .checkpoint import INDEX, read_index
from .errors import CheckpointError
from .strict_json import quote

_METADATA = ["*.json", "merges.txt", "*.tiktoken", "*.jinja"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)/(?P<name>[\w.-]+\.gguf)")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def find(
    model: str | Path, *, revision: str | None = None, offline: bool | None = None, metadata_only: bool = False
) -> Path:
    """The folder of a checkpoint: an existing folder itself, or a hub id such as "Qwen/Qwen3-0.6B", downloaded.

    Only JSON, tokenizer and template files and the safetensors files of the index are fetched, never code or pickles.
    Or a GGUF file: an existing one, the only one of a folder without config.json, or one of a hub repository, named
    after its id ("Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf"). Of a split file the first part.

    Args:
        revision: a branch, tag or commit of the hub.
        offline: True uses only what was downloaded before; None follows the environment's HF_HUB_OFFLINE.
        metadata_only: leave the weights out.
    Raises: CheckpointError that says what to do.
    """
    try:
        folder = Path(model).expanduser()
    except RuntimeError as problem:
        raise CheckpointError(f"{quote(str(model))}: {problem}; give the whole path") from problem
    if os.path.isdir(folder):  # False, where Path.is_dir raises, for a name the system cannot hold
        if revision is not None:
            raise CheckpointError(f"{model} is a folder, which has no revision {revision!r}; leave the revision out")
        return _only_gguf(folder) or folder
    if os.path.isfile(folder):
        if folder.suffix != ".gguf":
            raise CheckpointError(f"{model} is a file, but not a .gguf: give the folder of a checkpoint")
        return folder
    if file := _HUB_FILE.fullmatch(str(model)):
        return _download_gguf(file["repo"], file["name"], revision, bool(offline))
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"{quote(str(model))} is neither a folder nor a hub id of the form organisation/name")
    return _download(str(model), revision, bool(offline), metadata_only)


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that is no checkpoint otherwise, or the first part of its only one."""
    if (folder / "config.json").exists():
        return None
    files = sorted(folder.glob("*.gguf"))
    first = [path for path in files if not (part := _PART.search(path.name)) or int(part[1]) == 1]
    if len(first) > 1:
        raise CheckpointError(f"{folder} holds {len(first)} GGUF models; name one: {', '.join(p.name for p in first[:4])}")
    return first[0] if first else None


def _download_gguf(repo: str, name: str, revision: str | None, offline: bool) -> Path:
    """One file, or all parts of it, of a repository."""
    pattern = _PART.sub("-?????-of-\\g<2>.gguf", name)
    folder = _snapshot(repo, revision, offline, [pattern])
    if not (folder / name).is_file():
        raise CheckpointError(f"{repo} has no file {name}; its page on the hub lists them")
    return folder / name


def _download(repo: str, revision: str | None, offline: bool, metadata_only: bool) -> Path:
    folder = _snapshot(repo, revision, offline, _METADATA)
    if metadata_only:
        return folder
    index = folder / INDEX
    names = sorted(set(read_index(index).values())) if index.is_file() else ["model.safetensors"]
    # A snapshot's folder is named by its commit. Asking for that keeps both halves of one version, whatever is pushed
    # to the branch in the meantime.
    folder = _snapshot(repo, folder.name, offline, names)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{repo}: {quote(absent)} could not be found (offline, or the repository holds no safetensors weights; "
            "pickled .bin and .pt files are never read)"
        )
    return folder


def _snapshot(repo: str, revision: str | None, offline: bool, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # "*" of a pattern crosses folders, so everything inside folders (original/, onnx/) is left out by name.
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                local_files_only=offline,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
            )
        )
    except Exception as cause:  # also those of its HTTP client, which are a different package's from version to version
        raise _hub_error(repo, revision, cause) from cause


def _hub_error(repo: str, revision: str | None, cause: Exception) -> CheckpointError:
    from huggingface_hub import errors

    where = repo if revision is None else f"{repo} (revision {revision})"
    number, status = cause.errno if isinstance(cause, OSError) else None, _status(cause)
    if isinstance(cause, errors.HFValidationError):
        advice = "is not a valid hub id"
    elif isinstance(cause, errors.GatedRepoError):
        advice = "is gated: accept its terms on the hub, then set HF_TOKEN or run `hf auth login`"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        advice = "is not on the hub, or is private: check the spelling, or set HF_TOKEN or run `hf auth login`"
    elif isinstance(cause, errors.RevisionNotFoundError):
        advice = "has no such revision on the hub"
    elif status in (401, 403):
        advice = "is not for you, or not without a token: set HF_TOKEN or run `hf auth login`, with an account that may read it"
    elif status == 429:
        advice = "was asked for too often: wait a while, or set HF_TOKEN, with which more is allowed"
    elif status is not None and status >= 500:
        advice = "could not be had, for the hub itself has a fault: try again later"
    elif isinstance(cause, errors.LocalEntryNotFoundError):
        advice = "is not (completely) in the local cache, and the hub was not reached: connect, or give a local folder"
    elif number in (errno.ENOSPC, errno.EDQUOT):
        advice = "does not fit on the disk: free some space, or point HF_HOME to a larger disk"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "cannot be written to the cache: point HF_HOME to a folder you may write to"
    else:
        advice = "could not be downloaded: try again, or give a local folder"
    detail = " ".join(str(cause).split())
    return CheckpointError(f"{where} {advice} [{type(cause).__name__}: {detail[:500]}]")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or what it was raised from, came of."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return int(response.status_code)
        error = error.__cause__ or error.__context__
    return None
