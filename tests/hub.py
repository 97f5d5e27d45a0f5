"""A stand-in for the Hugging Face hub: a real HTTP server on 127.0.0.1 that the real client talks to.

It speaks as much of the hub's HTTP API as model_info and snapshot_download use, serves files under any repository
name, records every request, and can be told to fail. Large files are redirected to another host, as LFS files are.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_thisIsASecretToken"
LFS_SUFFIXES = (".safetensors", ".onnx", ".data", ".model", ".bin")


@dataclass(frozen=True)
class Request:
    """A request as it arrived: method, decoded path without the query, and headers with lower-case names."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """What to do to requests whose `METHOD path` contains `match`, for the next `times` of them."""

    match: str
    times: int
    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    corrupt: bool = False


class Hub:
    """The server. Use it in a `with` statement and point HF_ENDPOINT at `url`."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def cdn(self) -> str:
        """The same server under another host name, as the hub's storage is another host."""
        return f"http://localhost:{self._server.server_port}"

    def add(
        self, repo: str, content: Path | Mapping[str, bytes], *, commit: str | None = None, branch: str = "main"
    ) -> str:
        """Serves a folder or a mapping of paths to bytes as a commit of `repo`, the new head of `branch`.

        Returns the commit: the one given, else one that is made from the content.
        """
        if isinstance(content, Path):
            content = {p.relative_to(content).as_posix(): p.read_bytes() for p in content.rglob("*") if p.is_file()}
        files = dict(sorted(content.items()))
        commit = (
            commit
            or hashlib.sha1(repr([(n, hashlib.sha256(b).digest()) for n, b in files.items()]).encode()).hexdigest()
        )
        self.repos.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def answer(self, match: str, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"{}") -> None:
        """Answers every request whose `METHOD path` contains `match` with this."""
        self._faults.append(Fault(match, 10**6, status, body, headers or {}))

    def cut(self, match: str, after: int, *, times: int = 1) -> None:
        """Closes the connection after so many bytes of the body."""
        self._faults.append(Fault(match, times, cut_after=after))

    def corrupt(self, match: str, *, times: int = 1) -> None:
        """Changes one byte of the body."""
        self._faults.append(Fault(match, times, corrupt=True))

    def heal(self) -> None:
        """Ends all faults."""
        self._faults.clear()

    def take(self) -> list[Request]:
        """The requests since the last call."""
        with self._lock:
            taken, self.requests = self.requests, []
        return taken

    def record(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.match in f"{request.method} {request.path}" and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def commit(self, repo: str, revision: str) -> str | None:
        commit = self.branches.get(repo, {}).get(revision, revision)
        return commit if commit in self.repos.get(repo, {}) else None


@contextmanager
def pointed_at(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub, and this process's client pointed to it with a cache of its own."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    # The test run as a whole is offline; these tests are about the network, on 127.0.0.1.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def downloaded(server: Hub) -> set[str]:
    """The files whose content was asked for since the last look."""
    found = (request.path.split("/", 5) for request in server.take() if request.method == "GET")
    return {parts[5] for parts in found if parts[3] == "resolve"}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    fault: Fault | None

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the tests' output clean."""

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.fault = self.hub.record(Request(self.command, path, headers))
        if self.fault and self.fault.status:
            return self._send(self.fault.status, self.fault.body, self.fault.headers)
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"/api/models/([^/]+/[^/]+)", lambda repo: self._info(repo, "main")),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", self._stored),
        ]
        for pattern, route in routes:
            if found := re.fullmatch(pattern, path):
                return route(*found.groups())
        return self._send(404, b"no such route")

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.hub.commit(repo, revision)
        if commit is not None:
            return commit, self.hub.repos[repo][commit]
        # The hub answers 401 for a repository that does not exist to a client without a token.
        known = repo in self.hub.repos
        self._send(404 if known else 401, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        return None

    def _info(self, repo: str, revision: str) -> None:
        if found := self._files(repo, revision):
            commit, files = found
            siblings = [
                {"rfilename": name, "size": len(body), "blobId": _git_hash(body), **_lfs(name, body)}
                for name, body in files.items()
            ]
            self._send_json({"id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings})

    def _tree(self, repo: str, revision: str) -> None:
        if found := self._files(repo, revision):
            self._send_json(
                [
                    {"type": "file", "path": name, "size": len(body), "oid": _git_hash(body), **_lfs(name, body)}
                    for name, body in found[1].items()
                ]
            )

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._files(repo, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif lfs := _lfs(name, files[name]).get("lfs"):
            self._send(
                302,
                b"",
                {
                    "Location": f"{self.hub.cdn}/cdn/{repo}/{commit}/{name}?X-Amz-Signature=signed",
                    "X-Repo-Commit": commit,
                    "X-Linked-Size": str(lfs["size"]),
                    "X-Linked-ETag": f'"{lfs["sha256"]}"',
                },
            )
        else:
            self._send(200, files[name], {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(files[name])}"'})

    def _stored(self, repo: str, commit: str, name: str) -> None:
        body = self.hub.repos[repo][commit][name]
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            self._send(206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
        else:
            self._send(200, body)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        if self.fault and self.fault.cut_after is not None:
            body, self.close_connection = body[: self.fault.cut_after], True
        self.wfile.write(body)


def _git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _lfs(name: str, body: bytes) -> dict[str, Any]:
    if not name.endswith(LFS_SUFFIXES):
        return {}
    sha256 = hashlib.sha256(body).hexdigest()
    return {"lfs": {"oid": sha256, "sha256": sha256, "size": len(body), "pointerSize": 134}}
