"""`find` against a stand-in for the hub: what is asked for, what is kept, and what each failure says.

The hub client reads HF_ENDPOINT and HF_HOME when it is imported, so it runs in child processes that obey one line of
JSON at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

WEIGHTS = {"a.weight": torch.arange(60.0).reshape(5, 12), "b.weight": torch.arange(7.0)}
INDEX = "model.safetensors.index.json"

CHILD = """
import json, sys
from qwen_ref.hub import find
from qwen_ref.errors import CheckpointError
for line in sys.stdin:
    name, options = json.loads(line)
    try:
        answer = {"folder": str(find(name, **options))}
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


def single(**others: bytes) -> dict[str, bytes]:
    """A checkpoint of one weight file, and all that other files a real repository has beside it."""
    return {
        "config.json": b'{"model_type": "qwen3"}',
        "tokenizer.json": b"{}",
        "merges.txt": b"#version: 0.2\n",
        "qwen.tiktoken": b"IQ== 0\n",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": save(WEIGHTS),
        "pytorch_model.bin": b"pickle",
        "model.pt": b"pickle",
        "modeling_qwen.py": b"raise SystemExit",
        "model-q4.gguf": b"GGUF",
        "README.md": b"# card",
        "original/params.json": b"{}",
        "original/consolidated.safetensors": b"other",
        "onnx/model.onnx": b"other",
        **others,
    }


STRAY = {"consolidated.safetensors": b"other"}  # all weights once more, in another layout
NEEDED = {"config.json", "tokenizer.json", "merges.txt", "qwen.tiktoken", "chat_template.jinja"}


def sharded() -> dict[str, bytes]:
    """Two shards and their index, beside a stray file."""
    files = single(**STRAY)
    del files["model.safetensors"]
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    for tensor, shard in names.items():
        files[shard] = save({tensor: WEIGHTS[tensor]})
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": names}).encode()
    return files


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """Repositories: id -> revision -> files. `failing` and `cut` break answers on purpose."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    failing: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)  # id -> status, headers
    cut: set[str] = field(default_factory=set)  # files that end in the middle
    fetched: list[str] = field(default_factory=list)
    push_after: tuple[str, str, dict[str, bytes]] | None = None  # once this file is fetched, main of this id is that
    url: str = ""

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revisions = self.repositories[repo]
        files = revisions.get(revision) or next((f for f in revisions.values() if commit_of(f) == revision), None)
        return files and (commit_of(files), files)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
            if repo in hub.failing:
                status, headers = hub.failing[repo]
                return self.reply(b"", status=status, **headers)
            if repo not in hub.repositories:
                return self.reply(b"", status=404, **{"X-Error-Code": "RepoNotFound"})
            found = hub.files(repo, rest[1] if len(rest) > 1 else "main")
            if found is None:
                return self.reply(b"", status=404, **{"X-Error-Code": "RevisionNotFound"})
            commit, files = found
            if api:
                return self.reply(json.dumps(self.describe(repo, commit, files, rest[:1] == ["tree"])).encode())
            return self.file("/".join(rest[2:]), commit, files)

        @staticmethod
        def describe(repo: str, commit: str, files: dict[str, bytes], tree: bool) -> Any:
            if tree:
                return [{"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                        for p, b in files.items()]  # fmt: skip
            return {"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]}

        def file(self, path: str, commit: str, files: dict[str, bytes]) -> None:
            if path not in files:
                return self.reply(b"", status=404, **{"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                hub.fetched.append(path)
                if hub.push_after and hub.push_after[0] == path:
                    _, repo, pushed = hub.push_after
                    hub.repositories[repo]["main"] = pushed
            etag = {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"', "X-Repo-Commit": commit}
            return self.reply(files[path], cut=path in hub.cut, **etag)

        def reply(self, body: bytes, status: int = 200, cut: bool = False, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection |= cut

    return Handler


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    http.daemon_threads = True
    hub.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The stand-in with nothing on it yet. Tests that share its cache use names of their own."""
    server.repositories, server.failing, server.cut, server.fetched, server.push_after = {}, {}, set(), [], None
    return server


class Child:
    """A process with a hub client of its own, on a cache that may be shared."""

    def __init__(self, home: Path, url: str, **environment: str) -> None:
        hidden = ("HF_", "HUGGING", "TRANSFORMERS", "HTTP", "ALL_PROXY")  # another hub, token, cache or proxy
        keep = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
        keep["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), keep.get("PYTHONPATH", "")])
        keep |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=keep)  # fmt: skip

    def send(self, name: str, **options: object) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([name, options]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, str]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the child ended; an error that is no CheckpointError"
        return json.loads(line)

    def find(self, name: str, **options: object) -> Path:
        self.send(name, **options)
        return Path(self.answer()["folder"])

    def error(self, name: str, **options: object) -> str:
        self.send(name, **options)
        return self.answer()["error"]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def child(server: Hub, home: Path) -> Iterator[Child]:
    """The process of most tests; starting one takes seconds."""
    one = Child(home, server.url)
    yield one
    one.end()


@pytest.fixture
def start(server: Hub, home: Path) -> Iterator[Any]:
    """A function that starts further processes; they end with the test."""
    children: list[Child] = []

    def start(url: str = server.url, home: Path = home, **environment: str) -> Child:
        children.append(Child(home, url, **environment))
        return children[-1]

    yield start
    for one in children:
        one.end()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_only_what_is_needed_is_fetched(hub, child):
    hub.repositories = {"org/one": {"main": single(**STRAY)}, "org/shards": {"main": sharded()}}
    folder = child.find("org/one", metadata_only=True)
    assert names(folder) == set(hub.fetched) == NEEDED
    folder = child.find("org/one")
    assert names(folder) == set(hub.fetched) == NEEDED | {"model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == single()["model.safetensors"]
    assert len(hub.fetched) == len(set(hub.fetched)), "a file was fetched twice"

    hub.fetched.clear()
    folder = child.find("org/shards")
    shards = {INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert names(folder) == set(hub.fetched) == NEEDED | shards


def test_revisions_are_honoured(hub, child):
    old, new = single(), single(**{"config.json": b'{"model_type": "qwen2"}'})
    hub.repositories = {"org/m": {"main": new, "v1": old}}
    folders = {revision: child.find("org/m", revision=revision) for revision in (None, "v1", commit_of(old))}
    assert folders[None].name == commit_of(new)
    assert folders["v1"] == folders[commit_of(old)] and folders["v1"].name == commit_of(old)
    assert (folders["v1"] / "config.json").read_bytes() == old["config.json"]
    assert (folders[None] / "config.json").read_bytes() == new["config.json"]
    assert "v9" in child.error("org/m", revision="v9")


def test_a_push_between_the_two_halves_does_not_mix_versions(hub, child):
    old, new = sharded(), {**single(), "config.json": b'{"model_type": "qwen2"}'}
    hub.repositories = {"org/moving": {"main": old, "v0": old}}
    hub.push_after = ("config.json", "org/moving", new)
    folder = child.find("org/moving")
    assert hub.repositories["org/moving"]["main"] is new, "the push did not happen"
    assert folder.name == commit_of(old) and (folder / "config.json").read_bytes() == old["config.json"]
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= names(folder)


def test_what_was_downloaded_loads_without_the_hub(hub, child, start):
    hub.repositories = {"org/kept": {"main": sharded()}, "org/half": {"main": sharded()}}
    folder, half = child.find("org/kept"), child.find("org/half", metadata_only=True)
    hub.fetched.clear()
    assert child.find("org/kept") == folder and hub.fetched == []
    assert child.find("org/kept", offline=True) == folder
    assert "cache" in child.error("org/never", offline=True)  # and not "not on the hub": it was not asked

    stopped = start("http://127.0.0.1:9")  # the discard port: nothing listens
    forbidden = start(HF_HUB_OFFLINE="1")
    for process in (stopped, forbidden):
        assert process.find("org/kept") == folder
        assert process.find("org/half", metadata_only=True) == half
        message = process.error("org/never")
        assert "org/never" in message and "cache" in message
    assert "cache" in forbidden.error("org/half")  # metadata, no weights; `stopped` would retry for half a minute
    assert hub.fetched == []


def test_each_failure_says_what_to_do(hub, child):
    pickles = {name: data for name, data in single().items() if name != "model.safetensors"}
    escape = {**sharded(), INDEX: b'{"weight_map": {"a": "../../x.safetensors"}}'}
    hub.repositories = {"org/pickles": {"main": pickles}, "org/escape": {"main": escape}}
    hub.failing = {
        "org/gated": (403, {"X-Error-Code": "GatedRepo"}),
        "org/private": (401, {"X-Error-Code": "RepoNotFound"}),
        "org/denied": (401, {}),
        "org/forbidden": (403, {}),
        "org/often": (429, {}),
        "org/broken": (500, {}),
        "org/down": (503, {}),
    }
    for name, expected in {
        "org/absent": "private",
        "org/gated": "gated",
        "org/private": "HF_TOKEN",
        "org/denied": "HF_TOKEN",
        "org/forbidden": "HF_TOKEN",
        "org/often": "too often",
        "org/broken": "try again later",
        "org/down": "try again later",
        "org/pickles": "safetensors",
        "org/escape": "../../x.safetensors",
        "org/bad..name": "",
        "no-such-folder": "neither a folder",
        "./no/such/folder": "neither a folder",
        "org/name\n": "neither a folder",
    }.items():
        message = child.error(name)
        assert name.strip().removeprefix("org/") in message and expected in message, message
        assert len(message) < 1000
    assert set(hub.fetched) <= NEEDED | {INDEX}


def test_a_download_that_breaks_off_leaves_nothing_that_looks_whole(hub, child):
    hub.repositories = {"org/cut": {"main": single()}}
    hub.cut = {"model.safetensors"}
    assert "org/cut" in child.error("org/cut")
    hub.cut = set()
    folder = child.find("org/cut")
    assert (folder / "model.safetensors").read_bytes() == single()["model.safetensors"]


def test_two_processes_download_at_once(hub, child, start):
    """The second without hf-xet, which is not needed."""
    hub.repositories = {"org/both": {"main": {**sharded(), "tokenizer.json": b" " * 3_000_000 + b"{}"}}}
    both = child, start(HF_HUB_DISABLE_XET="1")
    both[1].error("not-a-repository")  # it has imported everything
    for process in both:
        process.send("org/both")
    folders = [Path(process.answer()["folder"]) for process in both]
    assert folders[0] == folders[1]
    for name in names(folders[0]):
        assert (folders[0] / name).read_bytes() == hub.repositories["org/both"]["main"][name]


def test_a_cache_that_cannot_be_written(hub, start, tmp_path):
    hub.repositories = {"org/m": {"main": single()}}
    home = tmp_path / "home"
    home.write_text("a file where the cache should be")
    assert "org/m" in start(home=home).error("org/m")


def test_one_gguf_file_is_fetched_by_name_and_a_split_one_whole(hub, child):
    files = {"small-Q4_K_M.gguf": b"GGUF1", "small-Q8_0.gguf": b"GGUF2", "README.md": b"#",
             **{f"large-Q4_0-{i:05}-of-00003.gguf": b"GGUF" + bytes([i]) for i in (1, 2, 3)},
             "large-Q8_0-00001-of-00003.gguf": b"other"}  # fmt: skip
    hub.repositories = {"org/files-GGUF": {"main": files}}
    path = child.find("org/files-GGUF/small-Q8_0.gguf")
    assert path.read_bytes() == b"GGUF2" and hub.fetched == ["small-Q8_0.gguf"]
    path = child.find("org/files-GGUF/large-Q4_0-00001-of-00003.gguf")
    assert path.read_bytes() == b"GGUF\1"
    assert {f"large-Q4_0-{i:05}-of-00003.gguf" for i in (1, 2, 3)} < names(path.parent)
    assert set(hub.fetched) == names(path.parent)
    assert "has no file small-Q2_K.gguf" in child.error("org/files-GGUF/small-Q2_K.gguf")
    assert child.find("org/files-GGUF/small-Q8_0.gguf", offline=True).read_bytes() == b"GGUF2"


def test_a_gguf_file_at_hand_is_found(tmp_path, child):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert child.find(str(tmp_path)) == child.find(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    (tmp_path / "notes.txt").write_text("")
    assert "not a .gguf" in child.error(str(tmp_path / "notes.txt"))
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    assert "2 GGUF models; name one: a.gguf, b.gguf" in child.error(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert child.find(str(tmp_path)) == tmp_path
    for i in (1, 2):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"m-{i:05}-of-00002.gguf").write_bytes(b"GGUF")
    assert child.find(str(tmp_path / "c")).name == "m-00001-of-00002.gguf"
