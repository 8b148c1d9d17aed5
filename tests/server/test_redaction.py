"""No key stands in any log."""

from __future__ import annotations

import io
import logging
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.server.access.audit import RedactingFilter, redact
from qnext.server.access.keys import KeyStore
from tests.pace import growth

SECRET = "qn-" + "Ab0_-xYz9" * 4 + "1234567"


SHAPES = [
    "Authorization: Bearer {}",
    "authorization: bearer {}",
    "Authorization: Basic {}",
    "x-api-key: {}",
    "X-API-Key={}",
    "{{'authorization': 'Bearer {}', 'n': 1}}",
    '{{"x-api-key": "{}"}}',
    '{{\\"x-api-key\\":\\"{}\\"}}',
    "[(b'host', b'x'), (b'x-api-key', b'{}')]",
    "[(b'authorization', b'Bearer {}')]",
    "GET /v1/models?api_key={}&a=b",
    "GET /?access_token={} HTTP/1.1",
    "GET /?authorization=Bearer%20{} HTTP/1.1",
    "GET /?a=Bearer+{}",
    "x_api_key={}",
    "headers: {{'x-api-key': ['{}']}}",
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("secret", [SECRET, "sk-proj-1234567890abcdef", "plain-word", "pass%2Fword"])
def test_a_secret_in_its_place_is_redacted_whatever_it_looks_like(shape: str, secret: str) -> None:
    cleaned = redact(shape.format(secret))
    assert secret not in cleaned and "<redacted>" in cleaned
    assert redact(cleaned) == cleaned
    assert "HTTP/1.1" not in shape or cleaned.endswith("HTTP/1.1")


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_a_real_key_is_redacted_wherever_it_stands(before: str, after: str) -> None:
    for text in (
        before + SECRET + after,
        repr(before + SECRET),
        f"/v1/{before}%20{SECRET}",
        SECRET.replace("-", "%2D"),
    ):
        cleaned = redact(text)
        assert SECRET not in cleaned and SECRET[3:] not in cleaned and SECRET[5:20] not in cleaned
        assert redact(cleaned) == cleaned


def test_other_text_stays() -> None:
    for text in (
        "GET /v1/chat/completions 200 in 0.5 s",
        "task-force-of-many-words",
        "the bearer",
        "x-api-key is missing",
        "authorization failed",
        "model qn-4b",
        "12 keys read",
        "risk-adjusted-returns",
        "",
    ):
        assert redact(text) == text
    assert redact("a hunter2 b", ["hunter2"]) == "a <redacted> b"


# What stands once, and what fills the line behind it.
LONG = [
    ("", "bearer "),
    ("", "qn-"),
    ("", "authorization"),
    ("", "x-api-key: \\"),
    ("", "api_key" + " " * 50),
    ("", "sk%2d"),
    ("", "%20"),
    ("", "bearer+"),
    ("bearer", " "),
    ("authorization", "\\"),
    ("authorization", " "),
]


@pytest.mark.parametrize(("begin", "piece"), LONG)
def test_a_line_ten_times_as_long_takes_about_ten_times_as_long(begin: str, piece: str) -> None:
    """Work that grows with the square would take a hundred times as long."""
    small, large = (begin + piece * (size // len(piece)) for size in (20_000, 200_000))
    assert growth(lambda: redact(small), lambda: redact(large)) < 30


class Odd:
    def __str__(self) -> str:
        return f"odd {SECRET}"


@pytest.fixture
def logged() -> Any:
    """A logger whose handler redacts, and what it wrote."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s %(extra)s", defaults={"extra": ""}))
    handler.addFilter(RedactingFilter(["my plain key"]))
    logger = logging.getLogger("tests.redaction")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield logger, text
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (f"key {SECRET}", ()),
        ("key %s of %d", (SECRET, 5)),
        ("key %r", (SECRET.encode(),)),
        ("Bearer %s", ("abcdef",)),
        ("key %(key)s", ({"key": SECRET},)),
        ("%s", ({"headers": {"x-api-key": "abcdef"}},)),
        ("%s", (Odd(),)),
        ("%s", (ValueError(SECRET),)),
        ("x-api-key: %s %s", ("abcdef", 1)),
        ("a %s", ("my plain key",)),
        (f"100%% {SECRET}", (1,)),
    ],
)
def test_records_are_redacted(logged: Any, capsys: pytest.CaptureFixture[str], message: str, arguments: tuple) -> None:  # type: ignore[type-arg]
    _, text = logged
    logging.getLogger("tests.redaction.child").warning(message, *arguments)
    everything = text.getvalue() + capsys.readouterr().err
    assert "WARNING tests.redaction.child" in everything and "<redacted>" in everything
    assert not any(word in everything for word in (SECRET, SECRET[3:], "abcdef", "plain key"))


def test_exceptions_stacks_and_extra_fields_are_redacted(logged: Any) -> None:
    logger, text = logged
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"Authorization: Bearer abcdef, {SECRET}") from error
    except ValueError:
        logger.exception("failed", extra={"extra": f"x-api-key: {SECRET}"}, stack_info=True)
    written = text.getvalue()
    assert "Traceback" in written and "ValueError" in written and "Stack (most recent" in written
    assert SECRET not in written and "abcdef" not in written.replace('f"Authorization: Bearer abcdef', "")


def test_arguments_that_do_not_fit_show_no_key_either(logged: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logger, text = logged
    for message, arguments in (("%d and %s", (SECRET, 1)), ("nothing to fill", (SECRET,))):
        made = logging.LogRecord("name", logging.WARNING, "file.py", 1, message, arguments, None)
        logger.handlers[0].handle(made)
        printed = capsys.readouterr().err  # by logging itself
        assert message in printed and "<redacted>" in printed and SECRET not in text.getvalue() + printed


def test_formatters_that_read_the_arguments_still_can(logged: Any) -> None:
    """uvicorn's access log takes its five arguments apart."""
    from uvicorn.logging import AccessFormatter

    logger, text = logged
    logger.handlers[0].setFormatter(
        AccessFormatter("%(client_addr)s %(request_line)s %(status_code)s", use_colors=False)
    )
    logger.info('%s - "%s %s HTTP/%s" %d', "10.0.0.1:5", "GET", f"/v1/models?key={SECRET}", "1.1", 401)
    assert text.getvalue() == "10.0.0.1:5 GET /v1/models?key=<redacted> HTTP/1.1 401 Unauthorized\n"


def test_keys_that_are_made_have_the_form_that_is_redacted(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    for number in range(20):
        secret = store.create(str(number))[1]
        assert redact(f"x{secret}y", ()) == "x<redacted>" and set(secret) <= set(
            string.ascii_letters + string.digits + "-_"
        )
