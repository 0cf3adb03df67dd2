"""The child process of chat.py: renders chat templates, one JSON request and one JSON reply per line.

A template is a program from somebody else. Jinja's sandbox keeps it from the interpreter's internals but bounds neither
time nor memory, and Python can end a process but not a thread: hence a process, with an address-space limit here and a
time limit in the parent. It imports nothing of this package, so that it starts quickly and holds nothing worth reading.

Request: template, variables (all the template sees), own (names of those variables that come from the tokenizer, not
from the caller), control (the added tokens to find, or null), and limits: render_chars, render_seconds, memory_bytes.
Reply: {"segments": [[text, is_control], ...]} or {"error": message}.
"""

import json
import math
import re
import secrets
import signal
import sys
from datetime import datetime
from functools import lru_cache

# Stands for the control tokens a template writes, while it runs. Drawn per process and never told to anybody, so no
# caller can write it; letters and digits, so that no filter escapes, trims or splits it.
SECRET = "q" + secrets.token_hex(16)
THINK_TAGS = ("<think>", "</think>")
TRACEBACK_NAME = "<template>"  # jinja2's file name for a template made from a string


class TooLong(Exception):
    """The output is over its limit."""


def limit_memory(size):
    """Bound the address space, where the system knows how (Linux does; macOS ignores it; Windows has no such call)."""
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
    except (ImportError, ValueError, OSError):
        pass


def environment():
    """The environment that transformers renders chat templates in."""
    import importlib.metadata

    import jinja2.ext
    import jinja2.sandbox

    version = importlib.metadata.version("jinja2")
    if [int(part) for part in re.findall(r"\d+", version)[:3]] < [3, 1, 6]:
        raise ImportError(f"jinja2 {version} has known sandbox escapes; install jinja2>=3.1.6")

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant wrote, for training. It renders as its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

        def content(self, caller):
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """jinja2's, without attributes that begin with an underscore: those could reach Python's internals."""

        def __init__(*args, **attributes):
            self, *mappings = args
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*mappings, **attributes).items():
                self[name] = value

        def __setitem__(self, name, value):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute named {name!r}")
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    result = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    result.filters["tojson"] = tojson
    result.globals["raise_exception"] = raise_exception
    result.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    result.globals["dict"] = lambda *args, **items: dict(*args, **items)
    result.globals["namespace"] = Namespace
    return result


def marker(index):
    return f"{SECRET}{index:06d}"


def mark(text, tokens, among):
    """Put markers in place of the control tokens `among` all of them. Longest first, as the tokenizer matches them."""
    pattern = "|".join(map(re.escape, sorted(among, key=len, reverse=True)))
    return re.sub(pattern, lambda found: marker(tokens.index(found[0])), text) if among else text


def unmark(text, tokens):
    """[[text, is_control], ...], the inverse of `mark`."""
    pieces = re.split(SECRET + r"(\d{6})", text)
    return [[tokens[int(piece)] if i % 2 else piece, bool(i % 2)] for i, piece in enumerate(pieces)]


@lru_cache(maxsize=16)
def compiled(source, tokens):
    """The template, with markers for the control tokens in its own text and string constants."""
    import jinja2.nodes

    env = environment()
    tree = env.parse(source)
    for node in tree.find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const)):
        field = "data" if isinstance(node, jinja2.nodes.TemplateData) else "value"
        if isinstance(getattr(node, field), str):
            setattr(node, field, mark(getattr(node, field), tokens, tokens))
    return env.from_string(tree)


def mark_variables(variables, own, tokens):
    """Mark the tokenizer's own variables (eos_token), and the thinking tags in what the assistant said: templates look
    for them there to drop old reasoning, and in the model's own words they are what they say."""
    for name in own:
        variables[name] = mark(variables[name], tokens, tokens)
    thinking = [token for token in tokens if token in THINK_TAGS]
    for message in variables["messages"]:
        if message["role"] != "assistant":
            continue
        content = message.get("content")
        if isinstance(content, str):
            message["content"] = mark(content, tokens, thinking)
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                part["text"] = mark(part["text"], tokens, thinking)


def render(request):
    tokens = tuple(request["control"] or ())
    template = compiled(request["template"], tokens)
    if tokens:
        mark_variables(request["variables"], request["own"], tokens)
    pieces, size = [], 0
    for piece in template.generate(request["variables"]):
        pieces.append(piece)
        size += len(piece)
        if size > request["render_chars"]:
            raise TooLong(f"the chat template writes more than {request['render_chars']} characters")
    text = "".join(pieces)
    return unmark(text, tokens) if tokens else [[text, False]]


def describe(error, request):
    """The message of an error: for whom to blame, and the line of the template where it can be told."""
    import jinja2

    text = "".join(piece for piece, _ in unmark(str(error), request["control"] or ()))
    text = text.partition(SECRET[:8])[0][:2000]  # should something have cut a marker in two, the secret stays one
    if isinstance(error, TooLong | ImportError):
        return text
    if isinstance(error, MemoryError):
        return f"the chat template needs more than {request['memory_bytes'] >> 20} MiB of memory"
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == TRACEBACK_NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = "the chat template" if line is None else f"the chat template, line {line},"
    if type(error) is jinja2.TemplateError:
        return f"{where} refuses these messages: {text}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{where} has a syntax error: {text}"
    return f"{where} failed with {type(error).__name__}: {text}"


def main():
    sys.path += sys.argv[1:]  # where the parent found jinja2: isolated mode ignores PYTHONPATH
    for line in sys.stdin.buffer:
        request = json.loads(line)
        limit_memory(request["memory_bytes"])
        if hasattr(signal, "alarm"):  # in case the parent, which keeps the time, is gone
            signal.alarm(math.ceil(request["render_seconds"]) + 1)
        try:
            reply = {"segments": render(request)}
        except Exception as error:
            reply = {"error": describe(error, request)}
        sys.stdout.buffer.write(json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        sys.stdout.buffer.flush()
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    main()
