"""A local HTTP server that speaks the part of the Hugging Face hub's API that its client uses to list and fetch files:
``/api/models``, ``.../tree``, ``.../resolve`` with ETag and Range. It can break off, and ask for consent."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, OLDER = "c" * 40, "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """``repositories``: directory of each name; every file that ends with ``.safetensors`` is stored as LFS."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.gated: set[str] = set()
        self.token: str | None = None
        """Bearer token that lets into gated repositories."""
        self.claimed_sizes: dict[str, int] = {}
        """Paths whose size the listing claims to be another."""
        self.break_after: int | None = None
        """Bytes of a file after which the connection is closed, and every later one at once."""
        self.broken = False
        self.elsewhere = False
        """LFS files are delivered from another host, as the real hub does."""
        self.sent = 0
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        """(method, path, Range, Authorization) of all that was asked."""

    def ranges(self) -> list[str]:
        """The Range headers of all requests that had one."""
        return [asked for _, _, asked, _ in self.requests if asked]

    def entries(self, directory: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            name, data = file.relative_to(directory).as_posix(), file.read_bytes()
            size = self.claimed_sizes.get(name, len(data))
            row = {"type": "file", "path": name, "size": size, "oid": identity(data, lfs=False)}
            if name.endswith(".safetensors"):
                row["lfs"] = {"size": size, "oid": identity(data, lfs=True), "pointerSize": 134}
            rows.append(row)
        return rows


def identity(data: bytes, *, lfs: bool) -> str:
    """What git and LFS call a content."""
    return hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve(hub: HubServer) -> Iterator[str]:
    """The server's address while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range"), self.headers.get("Authorization")
        self.hub.requests.append((self.command, path, *asked))
        name = next((name for name in self.hub.repositories if f"/{name}" in path), None)
        if self.hub.broken:
            self.close_connection = True
        elif name is None:
            self.refuse(404, "RepoNotFound")
        elif path.startswith("/elsewhere/"):
            file = path.split(f"/{name}/")[1]
            self.deliver(self.hub.repositories[name] / file, COMMIT)
        elif path.startswith("/api/"):
            self.describe(name, path.split(f"/api/models/{name}")[1].strip("/").split("/"))
        else:
            _, revision, file = path.split(f"/{name}/")[1].split("/", 2)
            if name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                self.refuse(403 if asked[1] else 401, "GatedRepo")
            else:
                assert revision in (COMMIT, OLDER)
                if self.hub.elsewhere and file.endswith(".safetensors"):
                    self.redirect(name, file, revision)
                    return
                self.deliver(self.hub.repositories[name] / file, revision)

    def describe(self, name: str, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": COMMIT, "v1": OLDER}.get(revision, revision)
        if commit not in (COMMIT, OLDER):
            self.refuse(404, "RevisionNotFound")
        elif rest[0] == "tree":
            self.send(json.dumps(self.hub.entries(self.hub.repositories[name])).encode(), {})
        else:
            self.send(json.dumps({"id": name, "sha": commit, "siblings": []}).encode(), {})

    def refuse(self, status: int, code: str) -> None:
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def redirect(self, name: str, file: str, commit: str) -> None:
        data = (self.hub.repositories[name] / file).read_bytes()
        port = self.server.server_address[1]
        headers = {"Location": f"http://localhost:{port}/elsewhere/{name}/{file}", "X-Repo-Commit": commit}
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{identity(data, lfs=True)}"'}
        self.send(b"", headers, 302)

    def deliver(self, file: Path, commit: str) -> None:
        if not file.is_file():
            self.refuse(404, "EntryNotFound")
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{identity(data, lfs=file.suffix == ".safetensors")}"', "X-Repo-Commit": commit}
        status = 200
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        self.send(data, headers, status)

    def send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.break_after is not None and "ETag" in headers and len(data) > self.hub.break_after:
            data, self.hub.broken = data[: self.hub.break_after], True
            self.close_connection = True
        self.hub.sent += len(data)
        self.wfile.write(data)
        self.wfile.flush()
