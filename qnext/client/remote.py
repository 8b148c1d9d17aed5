"""A server at an address: its models, its errors, its event streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qnext.errors import UsageError

if TYPE_CHECKING:
    import httpx2

_MAX_MESSAGE = 300  # characters of a server's words in a line of ours


def root_of(url: str) -> str:
    """The address that paths such as /v1/models are appended to. Raises UsageError for an invalid address.

    >>> root_of("http://localhost:8000/v1/")
    'http://localhost:8000'
    """
    if not url.startswith(("http://", "https://")) or url.count("/") < 2 or not url.split("/")[2]:
        raise UsageError(f"--url {url}: must begin with http:// or https://, such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def headers_of(api_key: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    return headers if api_key is None else {**headers, "Authorization": f"Bearer {api_key}"}


def models_of(root: str, api_key: str | None) -> list[str]:
    """Names that the server lists; none where it has no such list.

    Raises UsageError, in one line, where the server cannot be reached or refuses the key.
    """
    import httpx2

    try:
        response = httpx2.get(f"{root}/v1/models", headers=headers_of(api_key), timeout=30.0)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise unreachable(root, error) from None
    if response.status_code in (401, 403, 503):
        raise UsageError(refusal(root, response.status_code, response.content))
    try:
        return [str(entry["id"]) for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def model_of(root: str, api_key: str | None, wanted: str | None) -> str:
    """The model name to send: `wanted`, or the first that the server lists. Raises UsageError as models_of, or for
    none."""
    names = models_of(root, api_key)
    if wanted is None and not names:
        raise UsageError(f"{root}: lists no model; give --model")
    return wanted or names[0]


def unreachable(root: str, error: Exception) -> UsageError:
    return UsageError(f"{root}: {type(error).__name__}: {' '.join(str(error).split()) or 'no answer'}")


def refusal(root: str, status: int, body: bytes) -> str:
    """One line that describes an error answer."""
    return f"{root}: {status}: {error_message(body)}"


def error_message(body: bytes) -> str:
    """The message of an error on one line, in the form of OpenAI, of Anthropic, or of neither."""
    import orjson

    try:
        document: Any = orjson.loads(body)
        error = document["error"]
        words = str(error["message"] if isinstance(error, Mapping) else error)
    except (ValueError, KeyError, TypeError):
        words = body.decode("utf-8", "replace")
    line = "".join(c if c.isprintable() else " " for c in " ".join(words.split()))
    return line[:_MAX_MESSAGE] or "no message"


def stream_events(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    """The documents of a stream of server-sent events, up to `[DONE]`. Raises UsageError for an error among them."""
    import orjson

    for data in _event_data(response.iter_bytes()):
        if data == b"[DONE]":
            return
        try:
            document = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise UsageError(f"{response.url.host}: a stream that is no JSON") from None
        if not isinstance(document, dict):
            continue
        if document.get("error"):
            raise UsageError(f"{response.url.host}: {error_message(data)}")
        yield document


def _event_data(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What stands behind `data:`. Lines end at newlines alone: text may hold what Unicode counts as line ends."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
