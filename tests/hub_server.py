"""A Hugging Face Hub for tests: an HTTP server on the loopback device that speaks the API as far as downloads need.

Model information, and files by HEAD and GET with ETag, X-Repo-Commit, ranges, and redirects to a second address as the
Hub's CDN has them. Errors carry the Hub's X-Error-Code. It keeps what it was asked.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_goodtoken"
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/main)?$")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repo:
    """`files` by name; `gated` gives its files, `private` all of it, to those with TOKEN alone."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False

    @property
    def commit(self) -> str:
        joined = b"".join(name.encode() + data for name, data in sorted(self.files.items()))
        return hashlib.sha1(joined).hexdigest()


@dataclass
class Hub:
    """`cuts`: how many answers to GET break off after half their bytes; `status`: what every request gets instead."""

    repos: dict[str, Repo]
    address: str = ""
    cdn: str = ""  # the same server by another name: huggingface_hub treats other hosts otherwise
    cuts: int = 0
    status: int = 0
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    tokens: list[tuple[str, str]] = field(default_factory=list)  # path, token

    def gets(self, name: str) -> list[str]:
        """The ranges under which the file `name` was asked for, "" for all of it."""
        return [wanted for method, path, wanted in self.asked if method == "GET" and path.endswith(name)]


@contextmanager
def serving(repos: dict[str, Repo]) -> Iterator[Hub]:
    hub = Hub(repos)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address, hub.cdn = (f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        hub, token = self.served, self.headers.get("authorization", "").removeprefix("Bearer ")
        hub.asked.append((self.command, path, self.headers.get("range", "")))
        hub.tokens.append((path, token))
        if hub.status:
            self._send(hub.status, b"{}")
        elif token and token != TOKEN:
            self._error(401, "", "Invalid credentials in Authorization header")
        elif found := _API.match(path):
            self._info(found[1], token)
        elif path.startswith("/cdn/"):
            repo, _, name = path.removeprefix("/cdn/").partition("//")
            self._file(hub.repos[repo].files[name], body)
        elif found := _FILE.match(path):
            self._resolve(found[1], found[2], found[3], token)
        else:
            self._send(404, b"no such page")

    def _repo(self, name: str, token: str) -> Repo | None:
        repo = self.served.repos.get(name)
        if repo is None or (repo.private and token != TOKEN):
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _info(self, name: str, token: str) -> None:
        if (repo := self._repo(name, token)) is None:
            return
        siblings = [
            {
                "rfilename": file,
                "size": len(data),
                "blobId": _sha1(data),
                "lfs": {"sha256": _sha256(data), "size": len(data), "pointerSize": 128},
            }
            for file, data in repo.files.items()
        ]
        info = {"_id": "0", "id": name, "modelId": name, "sha": repo.commit, "siblings": siblings, "tags": ["gguf"]}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str, token: str) -> None:
        if (repo := self._repo(name, token)) is None:
            return
        if repo.gated and token != TOKEN:
            self._error(403, "GatedRepo", f"Access to model {name} is restricted")
        elif revision not in ("main", repo.commit):
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif file not in repo.files:
            self._error(404, "EntryNotFound", "Entry not found")
        else:
            data = repo.files[file]
            headers = {
                "X-Repo-Commit": repo.commit,
                "X-Linked-Etag": f'"{_sha256(data)}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{self.served.cdn}/cdn/{name}//{file}",
            }
            self._send(302, b"", headers)

    def _file(self, data: bytes, body: bool) -> None:
        headers = {"ETag": f'"{_sha256(data)}"', "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if wanted := re.match(r"bytes=(\d+)-", self.headers.get("range", "")):
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = len(data)
        if body and self.served.cuts:
            self.served.cuts -= 1
            cut = (start + len(data)) // 2
            self.close_connection = True
        self._send(status, data[start:cut] if body else b"", headers, length=len(data) - start)

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
