"""A Hugging Face Hub for tests: repositories in memory, served on loopback; it records what was asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from nla_engine.models.hub import find

SMALL = {"config.json": b"{}", "tokenizer.json": b"[1]", "model.safetensors": b"weights" * 1000}
#: Files that repositories carry and nothing here reads.
BALLAST = {
    "README.md": b"# A model",
    ".gitattributes": b"*",
    "consolidated.safetensors": b"the weights again",
    "consolidated.00.pth": b"again",
    "model.fp16.safetensors": b"again",
    "pytorch_model.bin": b"again",
    "tf_model.h5": b"again",
    "flax_model.msgpack": b"again",
    "model.tflite": b"again",
    "model.gguf": b"again",
    "params.json": b"{}",
    "preprocessor_config.json": b"{}",
    "modeling_own.py": b"print()",
    "onnx/model.onnx": b"again",
    "original/consolidated.00.pth": b"again",
    "original/tokenizer.model": b"again",
    "images/plot.png": b"png",
}
#: Files with these endings are stored outside git, as on the Hub: their ETag is their sha256.
LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """files: by revision, path -> bytes. fault: (status, X-Error-Code, message) for every request of files, or all."""

    files: dict[str, bytes]
    commit: str = ""
    gated: bool = False
    fault: tuple[int, str, str] | None = None
    #: path -> (bytes after which its connection breaks, how many times it breaks)
    breaks: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit = self.commit or hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """Repositories by id; `asked`: method and path of every request, in order; `ranges`: those for a part of a file."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)

    def add(self, name: str, source: Path | dict[str, bytes]) -> Repository:
        """A repository of a directory's files, or of the given ones."""
        if isinstance(source, Path):
            source = {str(p.relative_to(source)): p.read_bytes() for p in source.rglob("*") if p.is_file()}
        self.repositories[name] = Repository(dict(source))
        return self.repositories[name]

    def fetched(self) -> list[str]:
        """Repository and path of every file whose bytes were asked for, sorted."""
        parts = [path.split("/", 5) for method, path in self.asked if method == "GET" and "/resolve/" in path]
        return sorted(f"{owner}/{name}:{file}" for _, owner, name, _, _, file in parts)


class Handler(BaseHTTPRequestHandler):
    """The routes that fetching a model takes."""

    hub: Hub
    protocol_version = "HTTP/1.0"  # one connection per request: none is left when the Hub stops

    def log_message(self, *_: object) -> None:
        """Log nothing: `asked` tells more."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            name, rest = "/".join(parts[2:4]), parts[4:]
            revision = "/".join(rest[1:]) if rest[:1] == ["revision"] else "main"
            if rest[:1] == ["tree"]:
                revision = rest[1]
            repository = self.find(name, revision)
            if repository is not None:
                self.describe(name, repository, tree=rest[:1] == ["tree"])
        elif len(parts) >= 5 and parts[2] == "resolve":
            repository = self.find("/".join(parts[:2]), parts[3])
            if repository is not None:
                self.file(repository, "/".join(parts[4:]))
        else:
            self.refuse(404, "", "no such route")

    def find(self, name: str, revision: str) -> Repository | None:
        """The repository at its one commit; otherwise sends the Hub's refusal."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif repository.fault is not None:
            self.refuse(*repository.fault)
        elif revision not in ("main", repository.commit):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        else:
            return repository
        return None

    def describe(self, name: str, repository: Repository, *, tree: bool) -> None:
        if not tree:
            siblings = [{"rfilename": path} for path in repository.files]
            self.json({"id": name, "sha": repository.commit, "siblings": siblings, "private": False})
            return
        entries = []
        for path, data in repository.files.items():
            entry: dict = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
            if path.endswith(LARGE):
                entry["lfs"] = {
                    "oid": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 134,
                }
            entries.append(entry)
        folders = {str(parent) for path in repository.files for parent in Path(path).parents} - {"."}
        self.json([*entries, *({"type": "directory", "path": path, "oid": "0" * 40} for path in folders)])

    def file(self, repository: Repository, path: str) -> None:
        data = repository.files.get(path)
        if repository.gated:
            self.refuse(403, "GatedRepo", "Access to this model is restricted")
            return
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        start = 0
        if part := self.headers.get("Range"):
            self.hub.ranges.append(f"{path} {part}")
            start = int(part.removeprefix("bytes=").split("-")[0])
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else git_id(data)
        self.send_response(206 if part else 200)
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if part:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        size, left = repository.breaks.get(path, (0, 0))
        if left:
            repository.breaks[path] = (size, left - 1)
            self.wfile.write(data[start : start + size])
            return
        self.wfile.write(data[start:])

    def json(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def git_id(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub without repositories, until the block ends."""
    handler = type("Handler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def forget(hub: Hub) -> None:
    """Forget what this process knows of the Hub, as a new process would."""
    find._commits.clear()
    hub.asked.clear()


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the Hub unreachable."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    forget(hub)
