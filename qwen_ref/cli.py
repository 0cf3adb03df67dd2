"""The command line: qwen-ref generate | chat | inspect | verify | quantize | score | kernels.

Flags carry mlx_lm's names where it has them. `--json` prints one JSON object (per turn in `chat`) on stdout; everything
that is not the answer goes to stderr. Exit status: 0 success, 1 `verify` found a difference, 2 an error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import QwenRefError, RequestError

if TYPE_CHECKING:
    from .generate import Piece, Result, Usage

DEFAULT_MODEL = "tiny"


def main(argv: list[str] | None = None) -> int:
    for name, mode in (("stdin", "r"), ("stderr", "w")):  # closed ones are None, and `print` takes that for standard output
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except QwenRefError as error:
        print(f"qwen-ref: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    except OSError as error:
        if error.filename is not None:  # of a file that nobody expected to fail: its traceback is what helps
            raise
        print(f"qwen-ref: cannot write the answer: {error.strerror}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    from .bench.cli import add_commands as add_kernel_commands

    parser = argparse.ArgumentParser(prog="qwen-ref", description="Run, inspect and verify Qwen models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, json_file: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if name != "quantize":  # which has it in front of OUT
            sub.add_argument("--model", help="a bundled name (tiny, tiny-moe, tiny-hybrid), a folder, a .gguf file, a hub id "
                                             "(Qwen/Qwen3-0.6B)")
        sub.add_argument("--revision", help="branch, tag or commit on the hub")
        if json_file:
            sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="machine-readable output, to a file if named")
        else:
            sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    generate = command("generate", run_generate, "Answer one prompt, streaming.")
    generate.add_argument("prompt_text", nargs="?", metavar="PROMPT", help="the prompt; - reads standard input")
    generate.add_argument("--prompt", help="the same as an option")
    generate.add_argument("--prefill-response", default="", help="words the answer begins with")
    generate.add_argument("--ignore-chat-template", action="store_true", help="continue the prompt as plain text")
    generate.add_argument("--logprobs", type=int, metavar="N", help="with --json: log probabilities, N alternatives each")
    chat = command("chat", run_chat, "Talk to a model; the conversation's cache is kept between turns.")
    for sub in (generate, chat):
        _add_sampling(sub)

    inspect = command("inspect", run_inspect, "Show a checkpoint's config, sizes and end tokens without its weights.")
    inspect.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")
    inspect.add_argument("--context", type=int, metavar="TOKENS", help="size the KV cache for this many tokens")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor of the checkpoint")
    verify = command("verify", run_verify, "Compare every activation with transformers on the same weights.", json_file=True)
    verify.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")
    verify.add_argument("--prompt", action="append", help="text to compare on (repeatable)")
    verify.add_argument("--dtype", help="float32 (default), float64, bfloat16 or float16")
    verify.add_argument("--device", default="cpu", help="default cpu")
    verify.add_argument("--levels", help="L0 keys, L1 operations, L2 activations, L3 logits, L4 greedy tokens, L5 relations; "
                                         "such as L0-L3 or L2,L4 (default: all)")
    verify.add_argument("--backend", metavar="NAME", help="implementation of our operations; default the formulas, eager")
    verify.add_argument("--against", default="transformers", metavar="FILE", help="an oracle file instead of transformers")
    verify.add_argument("--write-oracle", metavar="FILE", help="write what transformers computes, for --against elsewhere")
    verify.add_argument("--new-tokens", type=int, default=64, metavar="N", help="length of the greedy continuation")
    verify.add_argument("--seed", type=int, default=0, help="of random arguments and ids")
    verify.add_argument("--streaming", action="store_true", default=None, help="one block in memory at a time")
    verify.add_argument("--full", action="store_true", help="print every activation and check")
    verify.add_argument("--html", metavar="FILE", help="write the report as one page")
    score = command("score", run_score, "Perplexity, distance from the unquantised model, memory and speed, as a table.")
    score.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")
    score.add_argument("--text", required=True, metavar="FILE", help="UTF-8; documents end with <|endoftext|>")
    score.add_argument("--against", metavar="MODEL", help="the unquantised model it is compared with")
    score.add_argument("--formats", default="", metavar="LIST", help="to make of MODEL and measure: int8,int4:gptq,nf4,fp8,...")
    score.add_argument("--calibration", metavar="FILE", help="text for int4:gptq")
    score.add_argument("--window", type=int, metavar="TOKENS", help="default 2048, or what the model was made for")
    score.add_argument("--device", help="default the GPU if there is one")
    score.add_argument("--dtype", help="bfloat16, float16, float32 or float64; default what config.json names")
    quantize = command("quantize", run_quantize, "Write a quantised checkpoint; a run that was interrupted goes on.")
    quantize.add_argument("model_name", metavar="MODEL", help="a bundled name, a folder or a hub id")
    quantize.add_argument("out", metavar="OUT", help="the new folder; of gguf the new file")
    quantize.add_argument("--to", required=True, metavar="KIND", help="int8, int4, nf4, fp8, or gguf:q8_0, q4_0, q4_k")
    quantize.add_argument("--method", default="rtn", help="rtn rounds to nearest; gptq (int4) corrects as it rounds")
    quantize.add_argument("--group", type=int, default=128, help="of int4: columns that share a scale")
    quantize.add_argument("--calibration", metavar="FILE", help="text for gptq, of the kind the model will read")
    add_kernel_commands(commands)
    return parser


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("--system-prompt", help="the system message")
    add("--max-tokens", type=int, default=512, help="of an answer; default 512")
    add("--temp", "--temperature", dest="temperature", type=float, help="0 = greedy")
    add("--top-p", type=float, help="draw from the most likely tokens that together have this probability")
    add("--top-k", type=int, help="draw from the K most likely tokens; 0 = all")
    add("--min-p", type=float, help="draw from tokens at least this fraction as likely as the best")
    add("--repetition-penalty", type=float, help="above 1: less of what the prompt or the answer has said")
    add("--presence-penalty", type=float, help="taken off the logit of every token said")
    add("--frequency-penalty", type=float, help="taken off it once for every time it was said")
    add("--seed", type=int, help="the same seed draws the same answer")
    add("--stop", action="append", default=[], help="end before this text (repeatable)")
    add("--extra-eos-token", action="append", default=[], help="end at this token too (repeatable)")
    add("--thinking", action=argparse.BooleanOptionalAction, help="the template's enable_thinking")
    add("--thinking-budget", type=int, metavar="N", help="close the reasoning after N tokens")
    add("--chat-template-config", default="{}", metavar="JSON", help="further variables for the chat template")
    add("--speculate", type=int, default=0, metavar="K", help="the draft layer (MTP) guesses K tokens ahead")
    add("--device", help="default the GPU if there is one")
    add("--dtype", help="bfloat16, float16, float32 or float64; default what config.json names")
    add("--quantize", metavar="KIND", help="int8, int4, nf4 or fp8: round the weights while they are read")
    add("--fast", action="store_true", help="in fewer steps (Qwen2 to 3.6), compiled ones on a CPU; the same but for rounding")


def run_generate(args: argparse.Namespace) -> int:
    from .generate import encode_prompt, stream

    given = [text for text in (args.prompt, args.prompt_text) if text is not None]
    if len(given) != 1:
        raise RequestError("there are two prompts: PROMPT and --prompt" if given else
                           'there is no prompt; try: qwen-ref generate "Once upon a time"')
    if args.logprobs is not None and not args.json:
        raise RequestError("--logprobs are told with --json only: add it")
    text = sys.stdin.read() if given == ["-"] else given[0]
    model, tokenizer = _load(args)
    plain = args.ignore_chat_template or tokenizer.chat_template is None
    prompt: Any = text
    if not plain:
        prompt = encode_prompt(
            tokenizer, _messages(args.system_prompt, text), enable_thinking=args.thinking, variables=_variables(args)
        )
    ids = encode_prompt(tokenizer, prompt) + tokenizer.encode(args.prefill_response)
    pieces = stream(model, tokenizer, ids, chat=not plain, logprobs=args.logprobs, **_options(args, tokenizer))
    result = _show(pieces, quiet=args.json, prefix=args.prefill_response if not plain else text)
    if args.json:
        print(json.dumps({"model": _name(args), **_as_json(result)}, ensure_ascii=False))
    elif args.speculate:
        print(f"[{_guesses(result.usage)}, {result.decode_seconds:.2f} s]", file=sys.stderr)
    return 0


def run_chat(args: argparse.Namespace) -> int:
    from .generate import Session, encode_prompt, stream

    model, tokenizer = _load(args)
    session, messages = Session(model), _messages(args.system_prompt)
    if sys.stdin.isatty():
        print("Type a message; an empty line or Ctrl-D ends the conversation.", file=sys.stderr)
    for text in _lines():
        messages.append({"role": "user", "content": text})
        ids = encode_prompt(tokenizer, messages, enable_thinking=args.thinking, variables=_variables(args))
        pieces = stream(model, tokenizer, ids, chat=True, session=session, **_options(args, tokenizer))
        result = _show(pieces, quiet=args.json)
        messages.append({"role": "assistant", "content": result.text, "reasoning_content": result.reasoning})
        if args.json:
            print(json.dumps(_as_json(result), ensure_ascii=False), flush=True)
        else:
            usage, rate = result.usage, result.usage.completion_tokens / max(result.decode_seconds, 1e-9)
            answer = _guesses(usage) if args.speculate else f"{usage.completion_tokens} tokens"
            print(f"[{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} reused; {answer}, {rate:.0f} a second]",
                  file=sys.stderr)
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    from .describe import describe

    description = describe(_name(args), revision=args.revision, context=args.context)
    if args.json:
        print(json.dumps(description.to_json()))
    else:
        print(description.text(tensors=args.tensors))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from .loading import locate
    from .verify import verify, write_oracle
    from .verify.report import live, write_text

    name = _name(args)
    model = locate(name, revision=args.revision) if args.revision else name
    same = {key: getattr(args, key) for key in ("dtype", "device", "prompt", "new_tokens", "seed")}
    same["prompts"] = same.pop("prompt")
    if args.write_oracle:
        write_oracle(model, args.write_oracle, streaming=args.streaming, **same)
        print(f"qwen-ref: wrote {args.write_oracle}", file=sys.stderr)
        return 0
    files = [path for path in (args.json, args.html) if path not in (None, "-")]
    _check_targets(args, files)
    add, finish = live(print, args.full)
    report = verify(model, against=args.against, backend=args.backend, levels=args.levels, streaming=args.streaming,
                    progress=True if args.json == "-" else add, **same)
    data = json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False)
    if args.json == "-":
        print(data)
    else:
        finish()
        print("\n".join([*report.around_first_difference(), *report.closing()]))
    for path in files:
        write_text(path, report.html() if path == args.html else f"{data}\n")
    return 0 if report.ok else 1


def run_score(args: argparse.Namespace) -> int:
    from .loading import locate
    from .score import score

    name = _name(args)
    result = score(
        locate(name, revision=args.revision) if args.revision else name, _text(args.text), against=args.against,
        formats=[part for part in args.formats.split(",") if part], window=args.window, device=args.device, dtype=args.dtype,
        calibration=_text(args.calibration) if args.calibration else None,
    )  # fmt: skip
    print(json.dumps(result.to_json()) if args.json else result.table())
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    from .quantize import quantize

    result = quantize(
        _name(args), args.out, args.to, method=args.method, group=args.group, revision=args.revision,
        calibration=_text(args.calibration) if args.calibration else None,
    )  # fmt: skip
    for note in result.notes:
        print(f"qwen-ref: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps({**asdict(result), "folder": str(result.folder)}))
    else:
        print(f"{result.folder}: {result.bytes:,} bytes of weights")
    return 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise RequestError(f"{path}: {problem if isinstance(problem, ValueError) else problem.strerror}") from problem


def _check_targets(args: argparse.Namespace, files: list[str]) -> None:
    """Before the work: a file that cannot be written, and `--json MODEL`, where the model was taken for the file."""
    if args.json not in (None, "-") and not (args.model_name or args.model) and not args.json.endswith(".json"):
        raise RequestError(f"--json {args.json} names a file, and no MODEL is given: put the model first, as in "
                           f"verify {args.json} --json")
    for path in files:
        if not Path(path).absolute().parent.is_dir():
            raise RequestError(f"cannot write {path}: its folder does not exist")


def _load(args: argparse.Namespace) -> Any:
    from . import backend
    from .loading import load

    if args.model is None:
        print("qwen-ref: the bundled model `tiny` (4 million parameters, knows children's stories) answers; "
              "for a real one: --model Qwen/Qwen3-0.6B", file=sys.stderr)
    model, tokenizer = load(_name(args), device=args.device, dtype=args.dtype, quantize=args.quantize, revision=args.revision)
    if args.fast:
        backend.use("cpp")
        model = model.fuse()
    return model, tokenizer


def _name(args: argparse.Namespace) -> str:
    """The model that is named, in whichever way; the bundled one where none is. An empty name is for `load` to refuse."""
    given = (getattr(args, way, None) for way in ("model_name", "model"))
    return next((name for name in given if name is not None), DEFAULT_MODEL)


def _messages(system: str | None, user: str | None = None) -> list[dict[str, Any]]:
    turns = (("system", system), ("user", user))
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def _variables(args: argparse.Namespace) -> dict[str, Any]:
    try:
        variables = json.loads(args.chat_template_config)
    except (ValueError, RecursionError) as error:  # also numbers of 5000 digits, and brackets within brackets
        raise RequestError(f"--chat-template-config is not JSON: {error}") from error
    if not isinstance(variables, dict):
        raise RequestError("--chat-template-config must be a JSON object")
    return variables


def _options(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    extra = [tokenizer.id_of(token) for token in args.extra_eos_token]
    if None in extra:
        raise RequestError(f"--extra-eos-token: {args.extra_eos_token[extra.index(None)]!r} is not a token of this model")
    same = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "seed", "stop", "thinking_budget", "speculate")  # fmt: skip
    return {**{name: getattr(args, name) for name in same}, "stop_ids": extra}


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            if sys.stdin.isatty():
                return
            continue
        yield line


def _show(pieces: Iterator[Piece], *, quiet: bool, prefix: str = "") -> Result:
    """Print the answer as it comes, its reasoning in its tags, and return the whole."""
    if not quiet:
        print(prefix, end="", flush=True)
    inside = False
    result = None
    for piece in pieces:
        result = piece.result
        if quiet:
            continue
        if piece.reasoning and not inside:
            print("<think>")
            inside = True
        print(piece.reasoning, end="", flush=True)
        if piece.text and inside:
            print("\n</think>\n")
            inside = False
        print(piece.text, end="", flush=True)
    if not quiet:
        print()
    return result  # type: ignore[return-value]  # the last piece has it


def _guesses(usage: Usage) -> str:
    return (f"{usage.accepted_tokens} of {usage.drafted_tokens} guesses were right; {usage.completion_tokens} tokens in "
            f"{usage.completion_tokens - usage.accepted_tokens} passes")


def _as_json(result: Result) -> dict[str, Any]:
    """Keys as in the Python `Result`, with the two times under `timing`."""
    fields = asdict(result)
    timing = {name: round(fields.pop(name), 6) for name in ("prefill_seconds", "decode_seconds")}
    if fields["logprobs"] is None:
        del fields["logprobs"]
    return {**fields, "timing": timing}


if __name__ == "__main__":
    sys.exit(main())
