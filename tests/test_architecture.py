"""The house rules that code can hold: who imports whom, what an import costs, and that sibling models have not drifted."""

from __future__ import annotations

import ast
import difflib
import subprocess
import sys
from pathlib import Path

import qwen_ref
from qwen_ref.models import qwen2, qwen3, qwen3_5, qwen3_next, qwen4_exp

PACKAGE = Path(qwen_ref.__file__).parent
SUBJECTS = ("norms", "rotary", "attention", "delta", "dual_chunk", "moe", "linear", "streams", "tokens", "packed")  # the operations' families in the kernel bench
FORMULAS = ("attention", "block_attention", "delta", "dtypes", "dual_chunk", "feed_forward", "ngram", "norms", "rotary", "streams",
            "tokens")  # the files of qwen_ref/ops
# What a module of the package may import from it, downward only.
ALLOWED = {
    "errors": set(),
    "limits": set(),
    "memory": set(),
    "ops": {f"ops.{name}" for name in FORMULAS},
    "ops.dtypes": set(),
    **{f"ops.{name}": {"ops.dtypes", "ops.norms", "ops.attention"} for name in FORMULAS if name != "dtypes"},
    "cache": {"errors", "memory"},
    "torch_ops": {"ops"},
    "quant": set(),
    "quant.gguf_blocks": {"safetensors_file"},
    "quant.packed": {"ops", "quant.gguf_blocks"},
    "quant.blocked": {"quant", "quant.packed", "torch_ops"},
    "cpp": set(),
    "cpp.library": {"torch_ops"},
    "cpp.repack": {"memory", "cpp.library"},
    "cpp.operations": {"memory", "ops", "torch_ops", "quant", "quant.blocked", "quant.gguf_blocks", "quant.packed", "cpp.library"},
    "quant.format": {"config", "errors", "quant.packed"},
    "quant.bitsandbytes": {"config", "errors", "quant.format", "quant.packed"},
    "quant.fp8": {"config", "errors", "limits", "quant.format", "quant.packed"},
    **{f"quant.{name}": {"config", "errors", "cpp", "quant.format", "quant.packed"} for name in ("awq", "gptq")},
    "quant.fp4": {"config", "quant.format", "quant.fp8", "quant.packed"},
    "quant.compressed_tensors": {"config", "errors", "quant.format", "quant.fp4", "quant.fp8", "quant.packed"},
    "quant.layers": {"backend", "memory", "ops", "quant.format", "quant.packed"},
    "quant.convert": {"config", "errors", "layers", *(f"quant.{name}" for name in (
        "awq", "bitsandbytes", "compressed_tensors", "format", "fp4", "fp8", "ggml", "gptq", "layers", "packed"))},
    "quant.ggml": {"quant.format", "quant.gguf", "quant.gguf_blocks"},
    "quant.rounding": {"errors", "quant.fp4", "quant.packed"},
    "quant.making": {"memory", "errors", "layers", "quant.format", "quant.gguf", "quant.gguf_quantize", "quant.gguf_write",
                     "quant.layers", "quant.packed", "quant.rounding"},
    "quant.calibrated": {"ops", "errors", "layers", "quant", "quant.format", "quant.making", "quant.packed", "quant.rounding"},
    "quant.store": {"quant.bitsandbytes", "quant.format", "quant.packed", "quant.rounding"},
    "quant.gguf": {"safetensors_file", "strict_json", "errors", "limits", "quant.gguf_blocks", "quant.gguf_hybrid", "quant.gguf_meta", "quant.packed"},
    "quant.gguf_hybrid": {"safetensors_file", "strict_json", "config", "errors", "limits", "quant.gguf_blocks"},
    "quant.gguf_meta": {"strict_json", "config", "errors", "limits", "tokenizer"},
    "quant.gguf_quantize": {"errors", "quant.gguf_blocks"},
    "quant.gguf_write": {"strict_json", "errors", "safetensors_file", "quant.gguf", "quant.gguf_blocks", "quant.gguf_hybrid", "quant.gguf_meta",
                         "quant.gguf_quantize"},
    "backend": {"cpp", "ops", "torch_ops", "quant", "quant.blocked", "quant.packed", "errors"},
    "config": {"ops", "errors", "limits"},
    "layers": {"backend", "ops", "cache", "config"},
    "strict_json": {"errors", "limits"},
    "safetensors_file": {"errors", "limits", "strict_json"},
    "checkpoint": {"errors", "limits", "safetensors_file", "strict_json"},
    "hub": {"checkpoint", "strict_json", "errors"},
    "models": {"errors"},
    "models.common": {"cache", "layers", "checkpoint", "errors", "fuse", "hook_points", "hooks", "quant.layers"},  # fuse and hooks inside the methods that offer them
    "models.qwen1": {"backend", "ops", "cache", "config", "layers", "models.common"},
    "models.qwen2": {"backend", "ops", "cache", "config", "layers", "models.common"},
    "models.qwen3": {"backend", "cache", "config", "layers", "models.common"},
    "models.qwen3_next": {"backend", "cache", "config", "layers", "models.common", "ops"},
    "models.qwen4_exp": {"backend", "cache", "config", "errors", "layers", "models.common", "ops"},
    "models.qwen3_5": {"backend", "cache", "config", "layers", "models.common", "ops"},
    "fuse": {"backend", "cache", "cpp.library", "errors", "layers", "memory", "models", "models.common", "quant.format",
             "quant.layers", "quant.packed"},
    "chat": {"errors", "limits"},
    "tokenizer": {"errors", "limits", "chat"},
    "text": {"tokenizer"},
    "sampling": {"errors"},
    "speculative": {"cache", "errors", "models.common"},
    "loading": {"checkpoint", "strict_json", "config", "errors", "hub", "memory", "models", "models.common", "quant.convert", "quant.format", "quant.ggml",
                "quant.gguf", "quant.making", "tokenizer"},
    "generate": {"cache", "chat", "config", "errors", "models.common", "sampling", "speculative", "text", "tokenizer"},
    "retrieval": {"ops", "errors", "models.common", "tokenizer"},
    "hook_points": {"errors"},
    "hooks": {"backend", "ops", "cache", "errors", "hook_points"},
    "verify": {"__version__", "backend", "errors", "loading", "models.common", "tokenizer",
               "verify", "verify.bundle", "verify.levels", "verify.memory", "verify.operations", "verify.oracle",
               "verify.relations", "verify.report", "verify.streaming"},
    "verify.report": {"errors", "verify.html"},
    "verify.html": {"verify.report"},
    "verify.oracle": {"backend", "hook_points", "hooks", "errors", "models.common"},
    "verify.bundle": {"safetensors_file", "strict_json", "errors", "hook_points", "models.common", "verify.oracle"},
    "verify.streaming": {"backend", "checkpoint", "safetensors_file", "errors", "hook_points", "loading", "models.common", "verify.levels", "verify.oracle",
                         "verify.report"},
    "verify.operations": {"backend", "models.common", "ops", "quant", "quant.layers", "quant.packed", "verify.report"},
    "verify.levels": {"backend", "errors", "models", "models.common", "verify.bundle", "verify.oracle", "verify.report"},
    "verify.relations": {"backend", "models.common", "verify.levels", "verify.report"},
    "verify.memory": {"models.common", "verify.levels"},
    "study": {"study.attribution", "study.heads", "study.logit_lens", "study.patching", "study.profiles", "study.routing"},
    "study.inputs": {"errors"},
    "study.attribution": {"errors", "hook_points", "hooks", "layers", "study.inputs"},
    "study.heads": {"backend", "errors", "hook_points", "hooks", "study.inputs"},
    "study.logit_lens": {"errors", "hook_points", "hooks", "study.inputs"},
    "study.patching": {"errors", "hook_points", "hooks", "study.inputs"},
    "study.profiles": {"backend", "hooks", "study.heads", "study.inputs"},
    "study.routing": {"errors", "hook_points", "hooks", "study.inputs"},
    "plot": {"errors", "study.attribution", "study.logit_lens", "study.patching", "study.profiles", "study.routing"},
    "bench.entries": set(),
    "bench.emulator": {"backend", "errors", *(f"bench.emulator.{name}" for name in ("machine", "memory", "ptx"))},
    "bench.emulator.ptx": {"errors"},
    "bench.emulator.numbers": set(),
    "bench.emulator.memory": {"errors", "bench.emulator.numbers"},
    "bench.emulator.arithmetic": {f"bench.emulator.{name}" for name in ("machine", "numbers", "ptx")},  # machine: its type
    "bench.emulator.matrices": {"errors", *(f"bench.emulator.{name}" for name in ("machine", "numbers", "ptx"))},
    "bench.emulator.machine": {"errors", *(f"bench.emulator.{name}" for name in (
        "arithmetic", "matrices", "memory", "numbers", "ptx"))},
    "bench": {"bench.check", "bench.compile", "bench.measure", "bench.tune"},
    "bench.shapes": {"errors"},
    "bench.subjects": {"errors", *(f"bench.subjects.{name}" for name in SUBJECTS), "bench.subjects.common"},
    "bench.subjects.common": {"bench.shapes"},
    **{f"bench.subjects.{name}": {"ops", "errors", "bench.shapes", "bench.subjects.common"} for name in SUBJECTS},
    "bench.subjects.packed": {"quant", "quant.gguf_blocks", "quant.packed", "bench.shapes", "bench.subjects.common"},
    "bench.check": {"backend", "errors", "bench.emulator.memory", "bench.subjects", "bench.shapes"},
    "bench.measure": {"backend", "errors", "plot", "bench.check", "bench.subjects", "bench.shapes"},
    "bench.compile": {"backend", "errors", "bench.subjects", "bench.shapes"},
    "bench.tune": {"backend", "errors", "bench.check", "bench.compile", "bench.measure", "bench.shapes", "bench.subjects"},
    "bench.cli": {"backend", "errors", "loading", "bench.shapes", "bench.check", "bench.compile", "bench.emulator", "bench.measure", "bench.tune"},
    "describe": {"checkpoint", "strict_json", "config", "errors", "loading", "models.common", "quant.convert", "quant.format", "quant.ggml"},
    "quantize": {"checkpoint", "safetensors_file", "strict_json", "errors", "layers", "loading", "models.common", "quant", "quant.calibrated",
                 "quant.compressed_tensors", "quant.format", "quant.gguf_write", "quant.making", "quant.packed", "quant.store", "tokenizer"},
    "score": {"backend", "describe", "errors", "loading", "models.common", "quant.calibrated", "quant.making", "quantize", "tokenizer"},
    "__main__": {"cli"},
    "cli": {"__version__", "backend", "bench.cli", "errors", "generate", "loading", "describe", "quantize", "score", "verify", "verify.report"},
}


def imports_of(path: Path, module: str) -> set[str]:
    """Modules of the package that a file imports, at any depth of its code."""
    found = set()
    package = module.split(".")[:-1] if path.name != "__init__.py" else module.split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            target = [*base, *(node.module.split(".") if node.module else [])]
            if node.module:
                found.add(".".join(target))
            else:
                found.update(".".join([*target, alias.name]) for alias in node.names)
    return found


def test_imports_point_downward():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__" or path.name.startswith("_template"):
            continue
        extra = imports_of(path, module) - ALLOWED[module]
        assert not extra, f"{module} must not import {sorted(extra)}"


def test_only_verify_names_transformers():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert path.parts[-2:] == ("verify", "oracle.py") or not any(n.split(".")[0] == "transformers" for n in names), path


def test_no_assert_guards():
    for path in PACKAGE.rglob("*.py"):
        assert not any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))), path


def test_import_stays_light():
    """Which third-party modules `import qwen_ref` loads beyond torch's own. (Its time is measured in tools/bench_peers.)"""
    code = (
        "import torch, sys; before = set(sys.modules); import qwen_ref;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("transformers", "tokenizers", "huggingface_hub", "jinja2", "tqdm", "safetensors"):
        assert f"'{heavy}'" not in out, f"{heavy} is imported eagerly: {out}"


def source(module, name):
    """The lines of a class, comments and docstrings left out."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return [line.split("  #")[0] for line in ast.unparse(node).splitlines() if not line.strip().startswith(('"""', "'"))]


def differing(name, old, new):
    """The lines that only one of two generations' classes has."""
    lines = difflib.ndiff(source(old, name), source(new, name))
    return {line[2:].strip() for line in lines if line[0] in "+-"}


def test_siblings_differ_only_where_meant():
    """Qwen3's attention is Qwen2's but for the q/k norms and the bias; blocks and decoders are the same text, but that
    Qwen2's may attend in chunks."""

    def differences(name):
        return differing(name, qwen2, qwen3)

    assert not differences("Decoder"), "Decoder has drifted between qwen2 and qwen3"
    assert differences("Block") == {
        "self.self_attn = DualChunkAttention(config) if config.dual_chunk else Attention(config)",
        "self.self_attn = Attention(config)",
    }
    assert differences("Model") == {
        "self.model = DualChunkDecoder(config, config.dual_chunk) if config.dual_chunk else Decoder(config)",
        "self.model = Decoder(config)",
        "if self.config.dual_chunk:",
        "return ScaledCache([KVCache() for _ in self.model.layers], self.config.dual_chunk.original_context)",
    }
    assert differences("Attention") == {
        "hidden, dim, bias = (config.hidden_size, config.head_dim, config.qkv_bias)",
        "hidden, dim, bias = (config.hidden_size, config.head_dim, config.attention_bias)",
        "self.o_proj = Linear(config.num_attention_heads * dim, hidden, bias=False)",
        "self.o_proj = Linear(config.num_attention_heads * dim, hidden, bias=bias)",
        "self.q_norm = RMSNorm(dim, config.rms_norm_eps)",
        "self.k_norm = RMSNorm(dim, config.rms_norm_eps)",
        "q = self.q_proj(x).view(shape).transpose(1, 2)",
        "k = self.k_proj(x).view(shape).transpose(1, 2)",
        "q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)",
        "k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)",
    }


def test_hybrids_differ_only_where_meant():
    """Qwen3.5 splits the projections of Qwen3-Next's Gated DeltaNet; Qwen4-Exp lets its gate be chosen."""
    assert differing("Attention", qwen3_next, qwen3_5) == set()
    assert differing("SparseMoE", qwen3_next, qwen4_exp) == set()
    assert differing("SparseMoE", qwen3_next, qwen3_5) == {
        "self.top_k, self.normalize = (config.num_experts_per_tok, config.norm_topk_prob)",
        "self.top_k, self.normalize = (config.num_experts_per_tok, True)",
    }
    assert differing("GatedDeltaNet", qwen3_5, qwen4_exp) == {
        "self.norm = GatedRMSNorm(value, config.rms_norm_eps)",
        "self.norm = GatedRMSNorm(value, config.rms_norm_eps, config.output_gate_type)",
    }
    nets = ("\n".join(source(module, "GatedDeltaNet")) for module in (qwen3_next, qwen3_5))
    forwards = [net.split("def forward")[1].split("def project")[0] for net in nets]  # convolution, rule, state, norm
    assert forwards[0] == forwards[1] and "gated_delta_rule" in forwards[0]
