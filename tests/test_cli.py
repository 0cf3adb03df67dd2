"""The command line as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import qwen_ref as qr
from qwen_ref import cli
from qwen_ref.cache import RecurrentCache
from qwen_ref.describe import describe
from qwen_ref.errors import ConfigError
from qwen_ref.models import module_for


def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qwen_ref.cli", *args], capture_output=True, text=True, input=stdin, timeout=120)


def test_first_command_writes_a_story_and_says_who_answers():
    out = run("generate", "Once upon a time", "--max-tokens", "40", "--seed", "1")
    assert out.returncode == 0 and len(out.stdout.split()) > 15
    assert "bundled model" in out.stderr and "--model Qwen/Qwen3-0.6B" in out.stderr
    assert len(out.stderr.splitlines()) == 1


def test_json_equals_the_python_call():
    args = ["generate", "--model", "tiny-moe", "--prompt", "Once upon a time", "--temp", "0", "--max-tokens", "12"]
    out = run(*args, "--json", "--ignore-chat-template", "--logprobs", "1")
    data = json.loads(out.stdout)
    model, tokenizer = qr.load("tiny-moe")
    expected = qr.generate(model, tokenizer, "Once upon a time", temperature=0, max_tokens=12)[0]
    assert (data["text"], data["token_ids"], data["finish_reason"]) == (
        expected.text, expected.token_ids, expected.finish_reason)  # fmt: skip
    assert set(data["usage"]) >= {"prompt_tokens", "completion_tokens", "cached_tokens"}
    assert data["timing"].keys() == {"prefill_seconds", "decode_seconds"} and len(data["logprobs"]) == 12
    assert out.stderr == ""  # a named model needs no notice


def test_plain_and_chat_prompts_stdin_and_prefill():
    plain = run("generate", "-", "--ignore-chat-template", "--temp", "0", "--max-tokens", "5", stdin="The dog ran to the")
    assert plain.stdout.startswith("The dog ran to the")
    chat = run("generate", "A dog?", "--temp", "0", "--max-tokens", "5", "--prefill-response", "Once there was",
               "--no-thinking", "--system-prompt", "You tell stories.")  # fmt: skip
    assert chat.returncode == 0 and chat.stdout.startswith("Once there was")


def test_chat_keeps_the_conversation_and_reports_reuse():
    out = run("chat", "--temp", "0", "--max-tokens", "16", "--json", "--no-thinking", stdin="A story about a cat.\n\nAnother one.\n")
    turns = [json.loads(line) for line in out.stdout.splitlines()]
    assert len(turns) == 2
    assert turns[0]["usage"]["cached_tokens"] == 0 and turns[1]["usage"]["cached_tokens"] > 5
    assert "reused" in run("chat", "--max-tokens", "4", stdin="Hello\n").stderr


def test_chat_speculates():
    """A first message long enough that the second turn, which departs at its end, finds a mark in it."""
    options = ["chat", "--model", "tiny-hybrid", "--dtype", "float32", "--temp", "0", "--max-tokens", "16", "--no-thinking"]
    stdin = "A story about a cat, a dog and a big red ball. " * 5 + "\n\nAnother one.\n"
    plain, guessed = ([json.loads(line) for line in run(*options, "--json", "--speculate", k, stdin=stdin).stdout.splitlines()]
                      for k in ("0", "2"))  # fmt: skip
    for mine, theirs in zip(guessed, plain, strict=True):
        assert mine["token_ids"] == theirs["token_ids"] and mine["usage"]["cached_tokens"] == theirs["usage"]["cached_tokens"]
        assert mine["usage"]["accepted_tokens"] > 0 == theirs["usage"]["drafted_tokens"]
    assert len(plain) == 2 and plain[1]["usage"]["cached_tokens"] >= 64
    assert " guesses were right; 16 tokens in " in run(*options, "--speculate", "2", stdin=stdin).stderr
    refused = run("chat", "--model", "tiny", "--speculate", "2", stdin="Hello\n")
    assert refused.returncode == 2 and "no draft layer" in refused.stderr


@pytest.mark.parametrize("model", ["tiny", "tiny-moe", "tiny-hybrid"])
def test_fast_says_the_same(model):
    """In generation and in a conversation, whose second turn cuts the cache back."""
    options = ["--model", model, "--temp", "0", "--max-tokens", "24", "--dtype", "float32", "--json"]
    for command, stdin in (["generate", "A story about a cat."], ""), (["chat"], "A story about a cat.\n\nAnother one.\n"):
        slow, fast = (run(*command, *options, *more, stdin=stdin) for more in ([], ["--fast"]))
        said = [[json.loads(line)["token_ids"] for line in out.stdout.splitlines()] for out in (slow, fast)]
        assert said[0] == said[1] and said[0], fast.stderr


def test_inspect_needs_no_weights(tmp_path):
    source = qr.loading.ASSETS / "tiny-moe"
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    data = json.loads(run("inspect", str(tmp_path), "--json", "--context", "100").stdout)
    model, _ = qr.load("tiny-moe")
    assert data["total"] == sum(p.numel() for p in model.parameters()) == sum(data["parameters"].values())
    assert data["weight_bytes"] == 2 * data["total"]
    cache = model.make_cache()
    model(torch.zeros(1, 64, dtype=torch.int64), cache=cache)  # the first buffer holds exactly 64
    assert data["kv_bytes_per_token"] * 64 == cache.nbytes() and data["kv_bytes"] == 100 * data["kv_bytes_per_token"]
    assert data["tensors"]["model.layers.0.mlp.experts.3.up_proj.weight"] == [96, 160]
    assert data["end_tokens"]["tokenizer_config.json"] == "<|im_end|>"
    text = run("inspect", str(tmp_path), "--tensors").stdout
    assert "active per token" in text and "model.layers.5.mlp.experts.9.down_proj.weight" in text


@pytest.mark.parametrize("name", ["qwen3", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inspect_counts_states_that_do_not_grow(name, dtype, tmp_path):
    config = {**TINY[name][1], "dtype": str(dtype)}  # with the prefix, as some write it
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = module_for(config).Model(module_for(config).Config.from_json(config)).to(dtype)
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)
    parts = [part for layer in cache.layers for part in (getattr(layer, "embedding", layer), getattr(layer, "mixer", layer))]
    states = {id(part): part.nbytes() for part in parts if isinstance(part, RecurrentCache)}
    found = describe(tmp_path)
    assert found.state_bytes == sum(states.values()) and ("recurrent states" in found.text()) == (name != "qwen3")


@pytest.mark.parametrize("dtype", ["int32", "nn", "complex64", "auto", 3])
def test_inspect_refuses_what_load_refuses(dtype, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY["qwen3"][1], "dtype": dtype}))
    with pytest.raises(ConfigError, match="is not one of bfloat16"):
        describe(tmp_path)


def test_inspect_counts_active_parameters_of_the_official_moe(data):
    raw = (data / "configs" / "Qwen--Qwen3-30B-A3B_config.json").read_text()
    from qwen_ref.describe import _idle
    from qwen_ref.loading import build

    model = build(json.loads(raw))
    assert round(model.num_parameters() / 1e9, 1) == 30.5
    assert 3.3e9 <= model.num_parameters() - _idle(model) < 3.4e9  # the card says 3.3B


def test_verify_exit_status(tmp_path):
    assert run("verify", "tiny", "--prompt", "Once upon a time").returncode == 0
    data = json.loads(run("verify", "tiny-moe", "--json", "--prompt", "Lily saw").stdout)
    assert data["ok"] and data["rows"]
    assert run("verify", str(tmp_path)).returncode == 2


@pytest.mark.parametrize("args,message", [
    (["generate", "A", "--device", "foo"], "device 'foo' cannot be used here"),
    (["generate", "A", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    (["generate", "A", "--revision", "main"], "tiny is bundled and has no revision 'main'"),
    (["inspect", "--model", "~nosuchuser/x"], "give the whole path"),
    (["verify", "tiny", "--backend", "foo"], "no operation has an implementation 'foo'"),
    (["verify", "tiny", "--device", "foo"], "device 'foo' cannot be used here"),
    (["generate", "A", "--model", ""], "the model is ''"), (["inspect", ""], "the model is ''"),
    (["generate", "A", "--prompt", ""], "two prompts"), (["generate", "A", "--logprobs", "3"], "--json only"),
    (["generate", "A", "--chat-template-config", "[" * 100_000], "not JSON"),
    (["generate", "A", "--chat-template-config", f'{{"a": {"9" * 5000}}}'], "not JSON"),
    (["verify", "tiny", "--levels", "L1", "--seed", "9" * 20], "fit in 64 bits"),
    (["score", "tiny", "--text", __file__, "--window", "0"], "window is 0; it must be from 2 to"),
    *((["generate", "A", "--chat-template-config", json.dumps({name: 1})], f"cannot be named '{name}'")
      for name in ("messages", "tools", "self", "allow_special")),
])  # fmt: skip
def test_refusals_that_need_no_process_of_their_own(args, message, capsys):
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_streams_that_are_closed_or_full():
    def shell(line: str) -> subprocess.CompletedProcess[str]:
        command = f"{sys.executable} -m qwen_ref.cli {line}"
        return subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)

    out = shell("generate Once --json --max-tokens 2 2>&-")
    assert out.returncode == 0 and json.loads(out.stdout)["model"] == "tiny"
    out = shell("generate - --ignore-chat-template <&-")
    assert out.returncode == 2 and "prompt is empty" in out.stderr and "Traceback" not in out.stderr
    assert shell("chat --json <&-").returncode == 0
    out = shell("inspect tiny >/dev/full")
    assert out.returncode == 2 and "cannot write the answer: No space left" in out.stderr and "Traceback" not in out.stderr


def test_the_module_is_the_command():
    out = subprocess.run([sys.executable, "-m", "qwen_ref", "--version"], capture_output=True, text=True, timeout=120)
    assert (out.returncode, out.stdout) == (0, f"qwen-ref {qr.__version__}\n")


@pytest.mark.parametrize("args,message", [
    (["generate"], "no prompt"), (["generate", "A", "--temp", "-1"], "temperature"),
    (["generate", "A", "--model", "nobody"], "neither a folder"), (["generate", "A", "--max-tokens", "0"], "max_tokens"),
    (["generate", "A", "--chat-template-config", "[1]"], "JSON object"), (["inspect", "./nowhere/at/all"], "neither a folder"),
    (["generate", "A", "--extra-eos-token", "<|nope|>"], "not a token"), (["generate", "A", "--dtype", "int3"], "int3"),
])  # fmt: skip
def test_errors_are_one_line_and_status_2(args, message):
    out = run(*args)
    assert out.returncode == 2 and message in out.stderr.splitlines()[-1] and "Traceback" not in out.stderr
