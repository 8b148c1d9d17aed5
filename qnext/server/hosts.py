"""Under which names a server answers, so that no page of the web reaches it by a name of its own. No torch.

A browser sends what stands in its address bar as Host. A page whose name suddenly means 127.0.0.1 (DNS rebinding)
passes every other check of the browser, and is told apart by that alone.
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
    """A Host header that can be read: a name in lower case, or an address; `port` None where it names none."""

    name: str
    address: IPv4Address | IPv6Address | None
    port: int | None


def parse_host(text: str) -> Host | None:
    """None for what is no host with a port perhaps. One dot at the end of a name changes nothing."""
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
    """Names and addresses that one listener is asked for.

    Always: localhost, loopback addresses, the address that it is bound to. Where it is bound to another than loopback:
    the machine's name. Any address, which no name server can point elsewhere, where a key is needed or the listener is
    open to others anyway. `allowed` adds names, `*.example.org` for all below one, `*` for every name; each may have a
    port, and then means that port alone. `bound` None is a Unix socket, which no browser opens: any name will do there
    unless some are given.
    """

    def __init__(self, bound: str | None, allowed: Iterable[str] = ()) -> None:
        """Raises UsageError for what is no name."""
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
    """Whether a page of `origin` has come from where the request goes. A proxy may have taken TLS away."""
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
