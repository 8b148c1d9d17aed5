"""The host names under which a server answers: a defence against DNS rebinding. No torch.

An attacker's page can point its own name at 127.0.0.1. The browser then takes the server for the page's origin, and
only the Host header still shows the attacker's name.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from qnext.errors import UsageError

_HOST = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._-]{1,254}))(?::(?P<port>[0-9]{0,5}))?"
)
_ANY = "*"


class Host(NamedTuple):
    """A readable Host header: a name in lower case, or an address. `port` is None where the header has none."""

    name: str
    address: IPv4Address | IPv6Address | None
    port: int | None


def parse_host(text: str) -> Host | None:
    """The host in a header, or None for a text that is neither a host nor host:port. One dot at the end of a name is
    dropped."""
    found = _HOST.fullmatch(text)
    if found is None:
        return None
    port = int(found["port"]) if found["port"] else None
    name = (found["address"] or found["name"]).lower().removesuffix(".")
    try:
        address = IPv6Address(name) if found["address"] else _address(name)
    except ValueError:
        return None
    if not name or (port or 0) > 65_535:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return Host(name, mapped or address, port)


class AllowedHosts:
    """Names and addresses that one listener accepts as Host.

    It always accepts localhost, loopback addresses and the address that it is bound to; outside loopback also the
    machine's name. It accepts every address where a key is needed or where the listener is not bound to loopback: no
    name server can redirect an address. `allowed` adds names, with a port or for all ports; `*.example.org` means all
    names below it, and `*` every name. `bound` None is a Unix socket: every name is accepted unless some are given,
    since no browser opens one.
    """

    def __init__(self, bound: str | None, allowed: Iterable[str] = ()) -> None:
        """Raises UsageError for an invalid name."""
        entries = [text.strip().lower() for value in allowed for text in value.split(",")]
        self._entries = [_entry(text) for text in entries if text != _ANY]
        self._allows_all = _ANY in entries or (bound is None and not self._entries)
        self._bound = None if bound is None else _parts(bound)
        self._is_exposed = self._bound is not None and not _is_loopback(self._bound)
        self._names = {"localhost"}
        if self._bound is not None and not (self._bound.address and self._bound.address.is_unspecified):
            self._names.add(self._bound.name)
        if self._is_exposed:
            machine = socket.gethostname().lower()
            self._names |= {machine, machine.partition(".")[0], f"{machine.partition('.')[0]}.local"}

    def allows(self, host: Host, *, needs_key: bool) -> bool:
        if self._allows_all or host.name in self._names or any(_covers(entry, host) for entry in self._entries):
            return True
        if host.address is None:
            return False
        if host.address.is_loopback:
            return True
        # 0.0.0.0 is this machine for a browser, whatever page it shows.
        return needs_key or (self._is_exposed and not host.address.is_unspecified)


def same_origin(origin: str, host: Host) -> bool:
    """Whether `origin` is the host that a request goes to. The schemes may differ, because a proxy may end TLS."""
    scheme, separator, rest = origin.partition("://")
    found = parse_host(rest) if separator and scheme in _PORTS else None
    if found is None or (found.name, found.address) != (host.name, host.address):
        return False
    return (found.port or _PORTS[scheme]) in ((host.port,) if host.port else _PORTS.values())


_PORTS = {"http": 80, "https": 443}


def _address(name: str) -> IPv4Address | None:
    try:
        found = ip_address(name)
    except ValueError:
        return None
    return found if isinstance(found, IPv4Address) else None


def _parts(bound: str) -> Host:
    found = parse_host(f"[{bound}]" if ":" in bound else bound)
    return Host(bound.lower(), None, None) if found is None else found


def _is_loopback(host: Host) -> bool:
    return host.name == "localhost" if host.address is None else host.address.is_loopback


def _entry(text: str) -> Host:
    """A name, an address, or a name that begins with "*."."""
    head, rest = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    found = parse_host(f"[{rest}]" if rest.count(":") > 1 and not rest.startswith("[") else rest)
    if found is None or (head and found.address is not None):
        raise UsageError(
            f"--allowed-hosts: {text[:60]!r} is no host name; expected names such as llm.example.org, "
            "*.example.org, or * for every name"
        )
    return found._replace(name=head + found.name)


def _covers(entry: Host, host: Host) -> bool:
    if entry.port not in (None, host.port):
        return False
    if entry.name.startswith("*."):
        return host.name.endswith(entry.name[1:]) and len(host.name) >= len(entry.name)
    return host.name == entry.name if entry.address is None else host.address == entry.address
