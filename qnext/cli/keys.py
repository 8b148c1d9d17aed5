"""`qnext keys`: the API keys of a server, in a file that holds only their hashes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.flags.moments import moment
from qnext.cli.flags.values import AsJson, option
from qnext.cli.parsing.command import VerbCommand, VerbGroup
from qnext.cli.parsing.records import with_flags
from qnext.cli.terminal.text import columns
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.server.access.keys import Key, KeyStore

app = typer.Typer(
    cls=VerbGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="API keys of a server: a file of hashes, which `qnext serve --keys FILE` reads. No secret is kept.",
)

File = Annotated[
    Path | None,
    typer.Option("--file", help="the file of keys [default: ~/.config/qnext/keys.json]", show_default=False),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="the key's id, 8 hex digits: `qnext keys list`")]

_COLUMNS = ("id", "name", "state", "expires", "scopes", "models", "rpm", "tpm", "parallel", "context")


@dataclass(frozen=True)
class KeyLimits:
    """What requests of a key may take."""

    rpm: Annotated[int | None, option("requests a minute")] = None
    tpm: Annotated[int | None, option("tokens a minute, of prompts and answers")] = None
    max_parallel: Annotated[int | None, option("requests at once")] = None
    max_context: Annotated[int | None, option("tokens of prompt and answer")] = None


@app.command(cls=VerbCommand)
@with_flags
def create(
    name: Annotated[str, typer.Option("--name", help="whose key it is")],
    *,
    file: File = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope", help="inference, tokenize, metrics or admin; again for more [default: inference, tokenize]"
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option("--expires", help="30d, 12h, or 2027-01-31 (when that day begins, UTC) [default: never]"),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="a model that it may use; again for more [default: all]")
    ] = None,
    limits: KeyLimits,
    as_json: AsJson = False,
) -> None:
    """Make a key. Its secret is printed once, alone on stdout."""
    from qnext.server.access.keys import SCOPES, USER_SCOPES

    for given in scope or ():
        if given not in SCOPES:
            raise UsageError(f"--scope {given[:40]!r} is none of {', '.join(SCOPES)}")
    for limit_name, limit in asdict(limits).items():
        if limit is not None and limit < 1:
            raise UsageError(f"--{limit_name.replace('_', '-')} must be at least 1, not {limit}")
    store = _store(file)
    key, secret = store.create(
        name,
        scopes=frozenset(scope) if scope else USER_SCOPES,
        expires=None if expires is None else _expiry(expires, time.time()),
        models=tuple(model) if model else None,
        requests_per_minute=limits.rpm,
        tokens_per_minute=limits.tpm,
        max_parallel=limits.max_parallel,
        max_context=limits.max_context,
    )
    _print_secret(store, key, secret, "made", as_json)


@app.command("list", cls=VerbCommand)
def list_(file: File = None, as_json: AsJson = False) -> None:
    """One line for each key."""
    keys = _store(file).keys()
    if as_json:
        print(json.dumps([_public(key) for key in keys], indent=2))
        return
    for line in columns([_COLUMNS, *map(_row, keys)]):
        print(line)


@app.command(cls=VerbCommand)
def show(key_id: Id, file: File = None, as_json: AsJson = False) -> None:
    """Everything about one key but its secret, which nobody has."""
    values = _public(_store(file).find(key_id))
    if as_json:
        print(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        shown = (
            _time(value) if name in ("created", "expires") else ", ".join(value) if isinstance(value, list) else value
        )
        print(f"{name:<20} {'-' if shown is None else shown}")


@app.command(cls=VerbCommand)
def revoke(key_id: Id, file: File = None, as_json: AsJson = False) -> None:
    """Make a key worthless for good; its line stays, for the audit log."""
    store = _store(file)
    key = store.revoke(key_id)
    if as_json:
        print(json.dumps(_public(key), indent=2))
    _note(store, key, "revoked")


@app.command(cls=VerbCommand)
def rotate(key_id: Id, file: File = None, as_json: AsJson = False) -> None:
    """Give a key a new secret, printed once, alone on stdout. Limits and id stay."""
    store = _store(file)
    key, secret = store.rotate(key_id)
    _print_secret(store, key, secret, "rotated", as_json)


def _store(file: Path | None) -> KeyStore:
    from qnext.server.access.keys import KeyStore, default_path

    return KeyStore(file or default_path())


def _print_secret(store: KeyStore, key: Key, secret: str, done: str, as_json: bool) -> None:
    print(json.dumps({**_public(key), "secret": secret}, indent=2) if as_json else secret)
    _note(store, key, done)


def _note(store: KeyStore, key: Key, done: str) -> None:
    print(f"{done} {key.id} ({key.name}) in {store.path}; a running server reads it on SIGHUP", file=sys.stderr)


def _public(key: Key) -> dict[str, Any]:
    values = key.as_dict()
    del values["digest"]
    return {**values, "state": key.state(time.time())}


def _row(key: Key) -> tuple[str, ...]:
    limits = (key.requests_per_minute, key.tokens_per_minute, key.max_parallel, key.max_context)
    models = "all" if key.models is None else ",".join(key.models)
    about = (key.id, key.name, key.state(time.time()), _time(key.expires) or "never", ",".join(sorted(key.scopes)))
    return (*about, models, *("-" if limit is None else str(limit) for limit in limits))


def _time(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%MZ")


def _expiry(text: str, now: float) -> int:
    """UNIX time of a span from `now` or of a day."""
    found = moment(text, "--expires", now, is_past=False)
    if found <= now:
        raise UsageError(f"--expires {text} is not in the future")
    return found
