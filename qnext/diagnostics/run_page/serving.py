"""The server of a run's page, in a thread of its own: it reads the file that the run writes, and the run waits for
nothing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from qnext.server.view.files import page_files, static_files

METRICS = "metrics.jsonl"
PORT = 8008
_PAGE = Path(__file__).with_name("page")
_POLL_SECONDS = 0.1  # until an end is noticed
_PART = 1 << 22  # bytes of an answer
_SHARED = ("theme.css", "early-theme.js", "theme.js", "dom.js", "palette.js", "icon.svg")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@contextmanager
def serving(folder: Path, *, port: int = PORT) -> Iterator[str]:
    """The address of the page of the run in `folder`, which is there while this is open. Another port is taken where
    `port` is in use."""
    handler = partial(_PageHandler, folder)
    try:
        server = _PageServer(("127.0.0.1", port), handler)
    except OSError:
        server = _PageServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), name="run page", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _PageServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a browser keeps its connection open


class _PageHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # of a connection on which nothing comes

    def __init__(self, folder: Path, *arguments: object) -> None:
        self._folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        assert isinstance(self.server, ThreadingHTTPServer)
        port = self.server.server_port
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._answer(403, b"this page is for this machine alone\n")  # another site's name that leads here
            return
        url = urlsplit(self.path)
        name = "index.html" if url.path == "/" else url.path.removeprefix("/page/")
        files = static_files(_PAGE)
        found = page_files().get(name) if name in _SHARED else files.get(name)
        if url.path == "/metrics":
            self._answer_metrics({key: values[0] for key, values in parse_qs(url.query).items()})
        elif found is not None:
            self._answer(200, found.body, found.content_type, found.headers)
        else:
            self._answer(404, b"no such page\n")

    def _answer_metrics(self, asked: Mapping[str, str]) -> None:
        """The whole lines behind byte `from`. A file that took the place of the one that was read before begins anew:
        `file` is its number."""
        number, start, lines = 0, 0, b""
        try:
            with (self._folder / METRICS).open("rb") as file:
                number = _number_of(file.fileno())
                if asked.get("file") == str(number) and asked.get("from", "").isdecimal():
                    start = int(asked["from"][:18])
                file.seek(start)
                lines = file.read(_PART)
        except OSError:
            pass  # the run has not begun
        lines = lines[: lines.rfind(b"\n") + 1]
        place = {"run": self._folder.absolute().name, "file": str(number), "next": start + len(lines)}
        head = json.dumps(place).encode() + b"\n"
        self._answer(200, head + lines, "application/x-ndjson", {"Cache-Control": "no-store"})

    def _answer(
        self,
        status: int,
        body: bytes,
        kind: str = "text/plain; charset=utf-8",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing: stderr belongs to the run."""


def _number_of(descriptor: int) -> int:
    """What tells a file from the one that takes its place."""
    return os.fstat(descriptor).st_ino
