"""Shared by all tests: the oracle, official data, and the rule that CI may not skip for want of transformers."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from qwen_ref.models import qwen2, qwen3, qwen3_5, qwen3_next, qwen4_exp

if os.environ.get("PYTEST_XDIST_WORKER"):  # one of several processes that share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


TINY = {
    "qwen2": (qwen2, qwen2.TINY),
    "qwen2_moe": (qwen2, qwen2.TINY_MOE),
    "qwen3": (qwen3, qwen3.TINY),
    "qwen3_moe": (qwen3, qwen3.TINY_MOE),
    "qwen3_next": (qwen3_next, qwen3_next.TINY),
    "qwen3_5": (qwen3_5, qwen3_5.TINY),
    "qwen3_5_moe": (qwen3_5, qwen3_5.TINY_MOE),
    "qwen4_exp": (qwen4_exp, qwen4_exp.TINY),
}

try:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
except ImportError as error:
    if os.environ.get("CI"):
        raise RuntimeError("CI must have transformers: it is the oracle of most tests") from error
    collect_ignore_glob = ["test_*.py"]


def make_pair(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0):
    """(ours, transformers' model) on the same random weights, drawn wide enough that no activation is near zero."""
    from qwen_ref.models import module_for

    module = module_for(config)
    ours = module.Model(module.Config.from_json(config)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in ours.named_parameters():
        std = 0.3 if p.dim() == 1 else scale * p.shape[-1] ** -0.5
        p.copy_(torch.randn(p.shape, generator=generator) * std + (name.endswith("norm.weight")))
    return ours.to(dtype), oracle(ours, config, dtype)


def oracle(ours: Any, config: dict[str, Any], dtype: torch.dtype):
    """transformers' model of `config` with our weights: eager attention, eager experts."""
    raw = dict(config)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(raw.pop("model_type"), **raw),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=dtype,
    ).eval()
    weights = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        p.data.copy_(weights[name])
    return theirs.requires_grad_(False)


@contextmanager
def casts_lifted(model):
    """transformers computes norms, softmax and decays in fp32 even in an fp64 model. Inside, its module sees a `torch`
    whose float32 is float64, and `.float()` leaves fp64 as it is, so that an fp64 run of it is one. Rotary angles, made
    from integers, stay fp32 on both sides."""
    module = sys.modules[type(model).__module__]

    class Lifted:
        float32 = float = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    real, module.torch = module.torch, Lifted()
    real_float = torch.Tensor.float
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else real_float(x)
    real_rope = type(model.model.rotary_emb).forward
    type(model.model.rotary_emb).forward = with_torch(module, real, real_rope)
    try:
        yield
    finally:
        module.torch = real
        torch.Tensor.float = real_float
        type(model.model.rotary_emb).forward = real_rope


def with_torch(module, torch_module, function):
    def run(*args, **kwargs):
        lifted, module.torch = module.torch, torch_module
        try:
            return function(*args, **kwargs)
        finally:
            module.torch = lifted

    return run


def patch_formula(monkeypatch, name: str, wrong: Any) -> None:
    """Replace a formula wherever it is looked up: as `ops.name`, and by the other formulas of its file."""
    for module in ("qwen_ref.ops", *(key for key in sys.modules if key.startswith("qwen_ref.ops."))):
        if hasattr(sys.modules[module], name):
            monkeypatch.setattr(sys.modules[module], name, wrong)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): what `make` returns, of JSON, made by one of all the processes that run the tests; the others wait."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder

    def made(name: str, make: Any) -> Any:
        kept = folder / f"{name}.json"
        with FileLock(folder / f"{name}.lock"):
            if not kept.exists():
                kept.write_text(json.dumps(make()), encoding="utf-8")
        return json.loads(kept.read_text(encoding="utf-8"))

    return made


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of official tokenizers, templates and configs."""
    folder = os.environ.get("QWEN_REF_TEST_DATA")
    if not folder:
        pytest.skip("QWEN_REF_TEST_DATA is not set: official files (configs, tokenizers, templates) not checked")
    return Path(folder)
