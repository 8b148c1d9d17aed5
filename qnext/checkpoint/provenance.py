"""Where a model folder comes from: `provenance.json` beside the weights, with what made it and hashes of its files.

It holds the provenance of what it was made from, and so the whole chain. A folder without one comes from elsewhere. All
that differs between two runs of the same command is under `cost`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from qnext.checkpoint.check import Layout
from qnext.checkpoint.hashing import sha256_of
from qnext.checkpoint.identity import identity_of
from qnext.errors import warn
from qnext.files import write_file, write_inside
from qnext.planning.machine import processor
from qnext.version import __version__

PROVENANCE_FILE = "provenance.json"
GGUF_KEY = "qnext.provenance"  # its value is the document without hashes and cost, which a file cannot hold of itself
_FORMAT_KEY, _FORMAT = "qnext_provenance", 1
_NUM_THREADS = 8
_OF_HUB = re.compile(r"models--(.+?)--(.+)/snapshots/([0-9a-f]{40})$")
_LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")
_MOST_CARD = 1 << 16  # characters of a README.md that are looked at


@dataclass
class Making:
    """What makes a folder, from the moment on that this is created.

    `parents` are from `parent_of`. `quality` and `cost` may be filled until the folder is written. `watts` is what the
    machine draws meanwhile, where somebody knows it; then the energy is told too.
    """

    verb: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parents: list[dict[str, Any]] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    quality: Mapping[str, Any] | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    watts: float | None = None
    _began: float = field(default_factory=time.time)

    def write_inside(self, folder: Path) -> None:
        """Hash the files of a folder that is being made, and write its provenance."""
        write_inside(folder / PROVENANCE_FILE, self._text(folder))

    def write_beside(self, folder: Path) -> None:
        """The same for a folder that is there already."""
        write_file(folder / PROVENANCE_FILE, self._text(folder))

    def _text(self, folder: Path) -> str:
        document = {**self.document(), "files": hashes_of(folder), "cost": self._cost()}
        return json.dumps(document, indent=2) + "\n"

    def document(self) -> dict[str, Any]:
        """All but the files and what making them cost: equal for equal commands."""
        licence = next((parent["licence"] for parent in self.parents if parent.get("licence")), None)
        found = {
            _FORMAT_KEY: _FORMAT,
            "made_by": self.verb,
            "qnext": __version__,
            "settings": {name: value for name, value in self.settings.items() if value is not None},
            "data": self.data,
            "licence": licence,
            "quality": self.quality,
            "parents": self.parents,
        }
        return {name: value for name, value in found.items() if value}

    def _cost(self) -> dict[str, Any]:
        seconds = self.cost.get("seconds", time.time() - self._began)
        found = processor()
        ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
        cost = {**self.cost, "ended": ended, "seconds": round(seconds, 3)}
        cost["machine"] = {"processor": found.name, "cores": found.num_usable}
        if self.watts is not None:
            cost |= {"watts": self.watts, "joules": round(self.watts * seconds)}
        return cost


def hashes_of(folder: Path, report: Callable[[int, int], None] | None = None) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of all files of a folder but hidden ones and the provenance itself; several side by side.
    `report` gets the bytes that are done, and all bytes."""
    paths = list(_files_of(folder))
    sizes = [path.stat().st_size for path in paths]
    done, total, lock = 0, sum(sizes), threading.Lock()

    def count(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            if report is not None:
                report(min(done, total), total)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        digests = list(pool.map(partial(sha256_of, report=count), paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {name: {"bytes": size, "sha256": digest} for name, size, digest in zip(names, sizes, digests, strict=True)}


def _files_of(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not is_hidden and path != folder / PROVENANCE_FILE:
            yield path


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """That of a folder; None where there is none, or a file of that name that is somebody else's."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        return parsed(path.read_bytes())
    except (OSError, ValueError):
        warn(f"{path}: cannot be read, so nothing is known of where the model comes from")
        return None


def parsed(text: str | bytes) -> dict[str, Any] | None:
    """None for what is none of ours. Raises ValueError for what is no JSON."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    is_ours = isinstance(document, dict) and document.get(_FORMAT_KEY) == _FORMAT
    return document if is_ours else None


def parent_of(layout: Layout, role: str = "source", *, name: str | None = None) -> dict[str, Any]:
    """A folder that another is made from: its name, never its place; the short name of the model; its licence; its own
    provenance. Files that are not there have no short name."""
    folder = layout.index.folder
    hub = _OF_HUB.search(folder.resolve().as_posix())
    found: dict[str, Any] = {"role": role, "name": name or (f"{hub[1]}/{hub[2]}" if hub else folder.resolve().name)}
    if hub:
        found["revision"] = hub[3]
    if all(path.is_file() for path in layout.index.files):
        found["model"] = identity_of(layout).model
    provenance = read_provenance(folder)
    licence = licence_of(folder) or (provenance or {}).get("licence")
    return {**found, **({"licence": licence} if licence else {}), "provenance": provenance}


def adapter_parent(folder: Path) -> dict[str, Any]:
    """The folder of an adapter that is merged, with the hashes of its files."""
    licence, files = licence_of(folder), hashes_of(folder)
    named = {"role": "adapter", "name": folder.resolve().name, "files": files}
    return {**named, **({"licence": licence} if licence else {}), "provenance": read_provenance(folder)}


def licence_of(folder: Path) -> dict[str, Any] | None:
    """What the card of a folder (README.md) and its licence file say; None where neither does."""
    found: dict[str, Any] = {}
    card = folder / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            head = re.match(r"---\n(.*?)^---\s*$", file.read(_MOST_CARD), re.DOTALL | re.MULTILINE)
        for key, name in (("license", "name"), ("license_name", "name"), ("license_link", "link")):
            value = head and re.search(rf"^{key}: *['\"]?([^\s'\"][^\n'\"]*)", head[1], re.MULTILINE)
            if value:
                found[name] = value[1].strip()[:200]
    for name in _LICENCE_FILES:
        if (folder / name).is_file():
            found |= {"file": name, "sha256": sha256_of(folder / name)}
            break
    return found or None


def data_of(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Files and folders of data: name, bytes and SHA-256, never content. What is gone by now has a name alone."""
    found = []
    for path in map(Path, paths):
        entry: dict[str, Any] = {"name": path.name}
        if path.is_dir():
            hashes = hashes_of(path)
            total = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
            entry |= {"files": len(hashes), "bytes": sum(each["bytes"] for each in hashes.values()), "sha256": total}
        elif path.is_file():
            entry |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        found.append(entry)
    return found


# What the words of an answer depend on. Other files may be edited, which a warning tells.
_READ = (".safetensors", ".jinja", "config.json", "tokenizer.json")
_OF_THE_MODEL = (".safetensors", ".safetensors.index.json", "config.json", "tokenizer.json", "vocab.json", "merges.txt")


def changed_files(
    folder: Path, provenance: Mapping[str, Any], report: Callable[[int, int], None] | None = None
) -> Iterator[tuple[str, bool]]:
    """(what is wrong, whether the model itself is another by it) of each file that differs from its provenance."""
    here = hashes_of(folder, report)
    for name, recorded in provenance.get("files", {}).items():
        is_model = name.endswith(_OF_THE_MODEL) and name not in ("generation_config.json", "tokenizer_config.json")
        found = here.get(name)
        if found is None:
            yield f"{folder / name}: is missing; {PROVENANCE_FILE} names it", is_model
        elif found["bytes"] != recorded["bytes"]:
            yield f"{folder / name}: has {found['bytes']} bytes, {recorded['bytes']} by {PROVENANCE_FILE}", is_model
        elif recorded.get("sha256") not in (None, found["sha256"]):
            yield f"{folder / name}: differs from its hash in {PROVENANCE_FILE}", is_model
    for name in sorted(here.keys() - provenance.get("files", {}).keys()):
        if name.endswith(_READ):
            yield f"{folder / name}: is not in {PROVENANCE_FILE}", name.endswith(_OF_THE_MODEL)


def chain_of(provenance: Mapping[str, Any]) -> list[str]:
    """One line for each thing that was done, newest first, for people."""
    lines = [_line_of(provenance)]
    for parent in provenance.get("parents", ()):
        name = parent["name"] + (f"@{parent['revision'][:12]}" if parent.get("revision") else "")
        known = parent.get("provenance")
        rest = chain_of(known) if known else [f"nothing is known of how it was made; model {parent.get('model', '-')}"]
        lines.append(f"  {parent['role']} {name}: {rest[0]}")
        lines += [f"  {line}" for line in rest[1:]]
    return lines


def _line_of(provenance: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in provenance.get("settings", {}).items() if value is not None)
    cost, licence = provenance.get("cost", {}), provenance.get("licence") or {}
    parts = [f"{provenance['made_by']}{f' ({settings})' if settings else ''}", f"qnext {provenance['qnext']}"]
    if "seconds" in cost:
        parts.append(f"{cost['seconds']:,.0f} s on {cost['machine']['processor']}, {cost['ended'][:10]}")
    if "joules" in cost:
        parts.append(f"{cost['joules']:,} J")
    if licence:
        parts.append(f"licence {licence.get('name') or licence.get('file')}")
    return "; ".join(parts)
