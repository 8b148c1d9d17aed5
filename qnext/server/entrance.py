"""Checks the access to a server before it starts: its keys, its address, its certificate."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from qnext.errors import ModelNotFound, UsageError
from qnext.server.access.keys import KeyRing
from qnext.server.run import Listen

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def make_key_ring(
    store: Path | None, *, plain: Sequence[str] = (), plain_file: Path | None = None, admin: Sequence[str] = ()
) -> KeyRing:
    """Keys of a store, plain keys, and those of a file with one key per line. Raises UsageError, ModelNotFound."""
    found = list(plain)
    if plain_file is not None:
        if not plain_file.is_file():
            raise ModelNotFound(f"{plain_file}: no such file of keys")
        found += [line.strip() for line in plain_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise UsageError(f"{plain_file}: holds no key")
    if any(not key.strip() for key in [*found, *admin]):
        raise UsageError("--api-key must not be empty")
    return KeyRing(store, plain=found, admin=admin)


def check_access(ring: KeyRing, listen: Listen, *, is_insecure: bool) -> None:
    """Raises UsageError for an address that everybody could use, and for a listener that nobody could use."""
    if (listen.certificate is None) != (listen.certificate_key is None):
        raise UsageError("--ssl-certfile and --ssl-keyfile belong together")
    if listen.certificate is not None:
        _check_certificate(listen.certificate, listen.certificate_key)
    if ring.is_open and listen.uds is None and listen.host not in _LOOPBACK and not is_insecure:
        raise UsageError(
            f"{listen.host} can be reached from elsewhere: give --api-key or --keys, or --insecure-no-auth"
        )
    if listen.admin_port is not None and not any("admin" in key.scopes for key in ring.keys):
        raise UsageError("--admin-port needs --admin-api-key, or a key with the scope admin in --keys")


def _check_certificate(certificate: str, key: str | None) -> None:
    """Raises UsageError where the files are not there or are no pair."""
    for option, name in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        if name is not None and not Path(name).is_file():
            raise UsageError(f"{option} {name}: no such file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise UsageError(
            f"--ssl-certfile {certificate}: no certificate that fits --ssl-keyfile {key} ({error})"
        ) from None
