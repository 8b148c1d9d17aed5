"""A hub with one model on this machine, for what huggingface_hub does with it in earnest."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Serves the files of a folder as org/model. The first answer with `broken` ends in its middle."""

    def __init__(self, folder: Path, broken: str | None = None) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.broken = broken
        self.ranges: list[tuple[str, int]] = []  # file and first byte of every download, in order
        self.announced: dict[str, str] = {}  # other checksums than those of the files
        self.holds: str | None = None  # the file whose bytes never come
        self.is_held = threading.Event()
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = handler.path.partition("?")[0]
        if path.startswith("/api/models/org/model/revision/"):
            self._send(handler, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/models/org/model/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._send(handler, json.dumps(entries).encode())
        elif path.startswith("/org/model/resolve/") and (name := path.rpartition("/")[2]) in self.files:
            self._send_file(handler, name, with_body=with_body)
        else:
            handler.send_response(404)
            handler.send_header("X-Error-Code", "RepoNotFound")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _send_file(self, handler: BaseHTTPRequestHandler, name: str, *, with_body: bool) -> None:
        data = self.files[name]
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
        start = int(found[1]) if found else 0
        end = int(found[2]) + 1 if found and found[2] else len(data)
        handler.send_response(206 if found else 200)
        handler.send_header("ETag", f'"{self.announced.get(name) or hashlib.sha256(data).hexdigest()}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("Content-Length", str(end - start))
        if found:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        handler.end_headers()
        if not with_body:
            return
        if found and found[2]:  # a look at a header
            handler.wfile.write(data[start:end])
            return
        self.ranges.append((name, start))
        if name == self.holds:
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            self.is_held.set()
            handler.connection.recv(1)  # nothing, when the other side is gone
            handler.close_connection = True
        elif name == self.broken:
            self.broken = None
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
        else:
            handler.wfile.write(data[start:])
