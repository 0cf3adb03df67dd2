"""A name, a folder or a hub id -> a model with its weights, and its tokenizer."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checkpoint import Checkpoint, LoadReport
from .config import text_config
from .errors import CheckpointError, ConfigError, RequestError
from .hub import find
from .memory import empty
from .models import module_for
from .models.common import LanguageModel
from .quant.convert import expand, install, pack, read_format
from .quant.format import Format
from .quant.making import matrices, quantize_model
from .strict_json import parse_object, read_json
from .tokenizer import Tokenizer

ASSETS = Path(__file__).parent / "assets"
BUNDLED = ("tiny", "tiny-moe", "tiny-hybrid")

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
EXTRA_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "generation_config.json",
)


def load(
    model: str | Path = "tiny",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    mapped: bool = True,
    quantize: str | None = None,
    progress: bool = True,
) -> tuple[LanguageModel, Tokenizer]:
    """Load a checkpoint in the official format.

    Args:
        model: "tiny", "tiny-moe" or "tiny-hybrid" (bundled), a folder, or a hub id such as "Qwen/Qwen3-0.6B".
        device: where the weights go; default the GPU if there is one.
        dtype: bfloat16, float16, float32 or float64; default what config.json names.
        revision, offline: of the hub. progress: a bar on stderr for anything that takes over a second.
        mapped: on a CPU, weights stored in the model's dtype stay in the mapped file, and on any device a table of which only
            rows are read, in whatever dtype it is stored; see `load_model`.
        quantize: "int8", "int4", "nf4" or "fp8": round the matrices while they are read, see `quant.making`. Takes memory
            for the result and one matrix. A checkpoint that is quantised needs no such word, and refuses it.
    Raises: ConfigError, CheckpointError, TokenizerError: each says which file and what to do.
    """
    path = locate(model, revision=revision, offline=offline)
    network = load_model(path, device=device, dtype=dtype, mapped=mapped, quantize=quantize, progress=progress)
    return network, _attach(network, path)


def load_model(
    path: Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    mapped: bool = True,
    dequantize: bool = False,
    quantize: str | None = None,
    progress: bool = True,
) -> LanguageModel:
    """The model of a folder or a GGUF file, without its tokenizer; `load_report` says what was found.

    `dequantize`: a quantised checkpoint becomes a plain model, by the definition of its format.

    A mapped file must stay as it is while the model is in use: cut in place it ends the process (SIGBUS), rewritten in
    place it changes the weights, as under every reader that maps. Replaced by rename, as the hub's cache does it, it
    does no harm. `mapped=False` reads everything into memory of its own. Writing to a weight never reaches the file.
    """
    device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with opened(path) as (raw, format, checkpoint):
        if quantize is not None and format is not None:
            raise RequestError(f"{path} is quantised already: load it without quantize={quantize!r}, or quantise the "
                               "checkpoint it was made from")
        dtype = pick_dtype(dtype, raw)
        first = device if format is None else torch.device("cpu")  # what is stored is repacked before it moves
        network = skeleton(raw, checkpoint).to(dtype)
        notes = prepare(network, format, checkpoint)
        checkpoint.check(network)
        if quantize is not None:
            notes += _quantize(network, quantize, checkpoint, device, progress)
        views = checkpoint.views(tables_only=first.type != "cpu") if mapped else {}
        network.map_tables(views)
        materialize(network, first, views)
        network.load_report = checkpoint.read(network, progress=progress)
    if format is None and quantize is None:
        _note_dtypes(network.load_report, raw)
    elif format is not None:
        if dequantize:
            expand(network, dtype)
        else:
            pack(network, dtype)
        if device != first:
            network.to(device)
    network.load_report.notes += notes
    if _names_sparse_attention(raw):
        network.load_report.notes.append("the sparse attention of dual_chunk_attention_config approximates the model: "
                                         "attention is exact here")
    return network.eval()



@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Any], Format | None, Checkpoint]]:
    """The config, the format (None = full precision) and the open weight files of a folder or of a GGUF file."""
    if path.suffix != ".gguf" or path.is_dir():
        raw = read_config(path)
        with Checkpoint(path) as checkpoint:
            yield raw, read_format(raw), checkpoint
        return
    from .quant.ggml import Ggml
    from .quant.gguf import open_gguf

    with open_gguf(path) as gguf:
        checkpoint = Checkpoint(path, gguf.files)
        checkpoint.report.notes += gguf.notes
        yield gguf.config, Ggml(kinds=gguf.kinds, orders=gguf.orders), checkpoint


def _quantize(network: LanguageModel, kind: str, checkpoint: Checkpoint, device: torch.device, progress: bool) -> list[str]:
    """Pack a model on the meta device, each matrix as it comes from the files; what is not packed is read afterwards."""
    from tqdm import tqdm

    dtype = network.dtype

    @contextlib.contextmanager
    def lend(name: str) -> Iterator[Tensor]:
        with checkpoint.lent(name) as tensor:
            yield tensor.to(dtype)

    total = sum(rows * columns for rows, columns in matrices(network).values())
    with tqdm(total=total, unit="weight", unit_scale=True, desc=f"rounding to {kind}", delay=1, disable=not progress) as bar:
        quantize_model(network, kind, lend=lend, device=device, done=bar.update)
    return [f"rounded to {kind} while it was read"]


def prepare(network: LanguageModel, format: Format | None, checkpoint: Checkpoint) -> list[str]:
    """Give a model on the meta device the quantised modules of its files; returns what a reader should know."""
    if format is None:
        return []
    plain = install(network, format, checkpoint.tensors(network))
    more = f" and {len(plain) - 3} more" if len(plain) > 3 else ""
    return [f"left in full precision by the file: {', '.join(plain[:3])}{more}"] if plain else []


def locate(model: str | Path, *, revision: str | None = None, offline: bool | None = None,
           metadata_only: bool = False) -> Path:
    """The folder of a bundled name, a path or a hub id, downloaded if need be (without weights if `metadata_only`)."""
    if not isinstance(model, str | os.PathLike) or not str(model):
        raise CheckpointError(f"the model is {model!r}: name a bundled one ({', '.join(BUNDLED)}), a folder, or a hub id, such "
                              "as Qwen/Qwen3-0.6B")
    if str(model) in BUNDLED and not Path(model).is_dir():
        if revision is not None:
            raise CheckpointError(f"{model} is bundled and has no revision {revision!r}; leave the revision out")
        return ASSETS / str(model)
    return find(model, revision=revision, offline=offline, metadata_only=metadata_only)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, the fields of `text_config` among the others; of a GGUF file, what would stand there."""
    if folder.suffix == ".gguf" and not folder.is_dir():
        from .quant.gguf import open_gguf

        with open_gguf(folder) as gguf:
            return gguf.config
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; is it a checkpoint folder in the Hugging Face format?")
    return text_config(read_json(path, error=ConfigError))


def skeleton(raw: dict[str, Any], checkpoint: Checkpoint) -> LanguageModel:
    """The model on the meta device with those of its optional parts whose tensors are in the files."""
    return build(raw, head=checkpoint.has_language_head(), draft=checkpoint.has_draft_layer())


def build(raw: dict[str, Any], *, head: bool = True, draft: bool = False) -> LanguageModel:
    """The model of a config.json on the meta device: all names and shapes, no memory.

    `head`, `draft`: whether the files have an output head, and a draft layer (MTP), which a config need not announce.
    """
    module = module_for(raw)
    config = module.Config.from_json(raw)
    with torch.device("meta"), _NoInitialValues():
        network = module.Model(config)
        if draft:
            network.mtp = network.make_mtp()
    if not head and not config.tie_word_embeddings:
        network.lm_head = None
    network.raw_config = raw
    return network


class _NoInitialValues(TorchFunctionMode):
    """Leaves out torch.nn.init, whose values a checkpoint replaces: on the meta device it costs seconds of imports."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def materialize(model: nn.Module, device: torch.device, views: Mapping[str, Tensor] | None = None) -> None:
    """Give every parameter its memory, once, so that tied ones stay one tensor: its view if there is one, else a new one."""
    views = views or {}
    made = {
        old: nn.Parameter(views[name] if name in views else empty(old.shape, old.dtype, device), requires_grad=False)
        for name, old in model.named_parameters()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = made[parameter]


def usable_device(device: torch.device | str) -> torch.device:
    """RequestError unless tensors can be made on it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # torch's: an unknown name, no such GPU, built without it
        raise RequestError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]:.120}") from error


def pick_dtype(dtype: torch.dtype | str | None, raw: dict[str, Any]) -> torch.dtype:
    """The dtype asked for, else the one config.json names, else float32."""
    name = str(dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _note_dtypes(report: LoadReport, raw: dict[str, Any]) -> None:
    claimed = str(raw.get("dtype") or raw.get("torch_dtype") or "").removeprefix("torch.")
    for dtype, count in report.dtypes.items():
        if claimed and dtype != claimed:
            report.notes.append(f"config.json says {claimed}, {count} tensors are {dtype}")


def _names_sparse_attention(raw: dict[str, Any]) -> bool:
    chunks = raw.get("dual_chunk_attention_config")
    return isinstance(chunks, dict) and any(chunks.get(f"sparse_attention_{name}") for name in ("enabled", "config"))


def _attach(network: LanguageModel, path: Path) -> Tokenizer:
    files = extra_files(path)
    if "generation_config.json" in files:
        where = str(path / "generation_config.json")
        network.generation_config = parse_object(files["generation_config.json"], where, ConfigError)
    network.extra_files = files
    tokenizer = load_tokenizer(path)
    check_fits(path, tokenizer, network)
    return tokenizer


def check_fits(path: Path, tokenizer: Tokenizer, network: LanguageModel) -> None:
    """CheckpointError for a tokenizer with ids that the model does not embed."""
    if tokenizer.vocab_size > network.config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model embeds {network.config.vocab_size}: "
            "they belong to different models"
        )


def extra_files(path: Path) -> dict[str, bytes]:
    """The tokenizer and generation files of a folder; of a GGUF file, those that its metadata stand for."""
    if path.suffix == ".gguf" and not path.is_dir():
        from .quant.gguf import open_gguf

        with open_gguf(path) as gguf:
            return gguf.tokenizer_files
    return {name: (path / name).read_bytes() for name in EXTRA_FILES if (path / name).is_file()}


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder or of a GGUF file."""
    if path.suffix != ".gguf" or path.is_dir():
        return Tokenizer.load(path)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in extra_files(path).items():
            (Path(folder) / name).write_bytes(content)
        return Tokenizer.load(folder)
