"""The page's static files, read once and kept in memory."""

from __future__ import annotations

import hashlib
import mimetypes
from functools import cache
from pathlib import Path

from qnext.server.routes import HttpResponse

_PAGE = Path(__file__).with_name("page")
# Nothing from elsewhere, no script or style but ours; what a model writes cannot run.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def page_files() -> dict[str, HttpResponse]:
    """Path under /page/ to the answer."""
    return static_files(_PAGE)


@cache
def static_files(folder: Path) -> dict[str, HttpResponse]:
    """Path inside `folder` to the answer. All files are read at once, so no path of a request ever reaches the disk."""
    files: dict[str, HttpResponse] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith((".", "_")) or path.suffix == ".py":
            continue
        content = path.read_bytes()
        kind = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(path.name)[0]
        tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        text = "; charset=utf-8" if (kind or "").startswith("text/") else ""
        files[path.relative_to(folder).as_posix()] = HttpResponse(
            content, content_type=f"{kind or 'application/octet-stream'}{text}", headers={**_PAGE_HEADERS, "ETag": tag}
        )
    return files
