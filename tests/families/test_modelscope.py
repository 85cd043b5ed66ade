"""ModelScope's own client against a server on this machine that answers as ModelScope does. The client is an extra:
without it these tests skip."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from kinema.errors import UserError
from kinema.families.download import RECORD, download

pytest.importorskip("modelscope_hub", reason="the extra `modelscope` is not installed")

NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
COMMIT = "9" * 40


@pytest.fixture
def address(t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if f"/models/{NAME}" not in url.path or query.get("Revision") not in ("master", COMMIT):
                self.send(json.dumps({"Code": 10010205001, "Message": "not found"}).encode(), 404)
            elif url.path.endswith("/repo/files"):
                rows = [row(path) for path in sorted(t2v.rglob("*"))]
                self.send(json.dumps({"Code": 200, "Success": True, "Data": {"Files": rows}}).encode())
            else:
                self.send((t2v / query["FilePath"]).read_bytes())

        def send(self, data: bytes, status: int = 200) -> None:
            if (asked := self.headers.get("Range")) and status == 200:
                first, last = asked.removeprefix("bytes=").split("-")
                whole, start = len(data), int(first)
                data, status = data[start : int(last) + 1 if last else None], 206
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{whole}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    def row(path: Path) -> dict[str, Any]:
        common = {"Path": path.relative_to(t2v).as_posix(), "Name": path.name, "Revision": "1" * 40, "CommittedDate": 5}
        if path.is_dir():
            return common | {"Type": "tree", "Size": 0, "Sha256": ""}
        data = path.read_bytes()
        newest = {"Revision": COMMIT, "CommittedDate": 7} if path.name == "model_index.json" else {}
        return common | {"Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()} | newest

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    import modelscope_hub

    modelscope_hub.set_default_config(modelscope_hub.HubConfig())  # reads the environment anew
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def get(to: Path, said: list[str], **changed: Any) -> Path:
    options: dict[str, Any] = {"family": "wan", "variant": "t2v-1.3b", "to": to, "source": "modelscope"}
    options |= {"revision": None, "parts": (), "repo": None, "dry_run": False}
    return download(**(options | changed), say=said.append)


def test_files_arrive_and_are_checked(address: str, tmp_path: Path, t2v: Path) -> None:
    said: list[str] = []
    place = get(tmp_path / "here", said)
    for file in (path for path in t2v.rglob("*") if path.is_file()):
        assert (place / file.relative_to(t2v)).read_bytes() == file.read_bytes()
    record = json.loads((place / RECORD).read_text())
    assert record["repositories"] == {NAME: COMMIT} and record["complete"]
    again: list[str] = []
    get(tmp_path / "here", again)
    assert any("to fetch: 0.0 kB" in line for line in again)


def test_what_is_not_there_is_named(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no some/other on ModelScope"):
        get(tmp_path / "here", [], repo="some/other")
    with pytest.raises(UserError, match="with a revision 'nowhere' on ModelScope"):
        get(tmp_path / "here", [], revision="nowhere")
