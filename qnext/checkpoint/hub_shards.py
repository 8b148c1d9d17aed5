"""Shards of a model on the hub, one at a time on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qnext.checkpoint.hashing import sha256_of
from qnext.checkpoint.header import (
    INDEX_FILE,
    SINGLE_FILE,
    header_length,
    load_json,
    parse_header,
    place_tensors,
    read_weight_map,
)
from qnext.checkpoint.hub import ALLOWED, telling_of
from qnext.checkpoint.ledger import ShardHeaders
from qnext.checkpoint.tensor_info import TensorInfo
from qnext.errors import CorruptCheckpoint, ModelNotFound, UsageError
from qnext.files import remove_file, write_file

_FIRST_BYTES = 1 << 18  # of a shard: most headers are shorter
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubShards:
    """A ShardSource: `name` at one commit of the hub, the one that the first run found.

    Raises as pull_model, UsageError where an earlier run was begun with another revision.
    """

    is_elsewhere = True

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = f"hub:{name}"
        self._repository = name
        self._revision = revision
        self._commit = ""
        self._sizes: dict[str, int] = {}  # by name of file
        self._folder = Path()

    def begin(self, place: Path) -> Path:
        """Everything but the shards is downloaded."""
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self._folder = place / "source"
        known = place / "hub.json"
        with telling_of(self._repository, self._revision):
            if not known.exists():
                document = {"name": self.name, "revision": self._revision, **self._ask()}
            else:
                document = load_json(known.read_bytes(), known)
                if (document.get("name"), document.get("revision")) != (self.name, self._revision):
                    raise UsageError(
                        f"{place}: an earlier run was begun with {document.get('name')}, revision "
                        f"{document.get('revision')}; give the same, or delete that folder"
                    )
            self._commit, self._sizes = document["commit"], document["sizes"]
            others = [pattern for pattern in ALLOWED if pattern != "*.safetensors"]
            huggingface_hub.snapshot_download(
                self._repository, revision=self._commit, local_dir=self._folder, allow_patterns=others
            )
        if not known.exists():
            write_file(known, json.dumps(document))
        return self._folder

    def _ask(self) -> dict[str, Any]:
        """The commit, and sizes of files."""
        import huggingface_hub

        found = huggingface_hub.snapshot_download(
            self._repository, revision=self._revision, allow_patterns=list(ALLOWED), dry_run=True
        )
        assert isinstance(found, list)
        if not any(info.filename.endswith(".safetensors") for info in found):
            raise ModelNotFound(f"{self._repository}: holds no safetensors files, so it is no model that can be loaded")
        return {"commit": found[0].commit_hash, "sizes": {info.filename: info.file_size for info in found}}

    def headers(self) -> ShardHeaders:
        index = self._folder / INDEX_FILE
        with telling_of(self._repository, self._revision):
            if not index.is_file():
                return ShardHeaders((self._folder / SINGLE_FILE,), self._header(self._folder / SINGLE_FILE))
            weight_map = read_weight_map(index)
            tensors = place_tensors(self._folder, weight_map, self._header)
        return ShardHeaders(tuple(self._folder / name for name in dict.fromkeys(weight_map.values())), tensors)

    def _header(self, file: Path) -> dict[str, TensorInfo]:
        size = self._sizes.get(file.name)
        if size is None:
            raise CorruptCheckpoint(f"{self._repository}: {file.name} is not on the hub")
        first = self._range(file.name, 0, min(_FIRST_BYTES, size))
        length = header_length(first[:8], file, size=size)
        if 8 + length > len(first):
            first += self._range(file.name, len(first), 8 + length)
        return parse_header(first[8 : 8 + length], file, size=size)

    def _range(self, name: str, start: int, end: int) -> bytes:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        response = get_session().get(self._url(name), headers=headers, timeout=60)
        hf_raise_for_status(response)
        data = bytes(response.content)
        if len(data) != end - start:
            raise ConnectionError(f"{name}: {len(data)} bytes came instead of {end - start}")
        return data

    def _url(self, name: str) -> str:
        import huggingface_hub

        return huggingface_hub.hf_hub_url(self._repository, name, revision=self._commit)

    def fetch(self, file: Path) -> None:
        """Go on where an earlier download stopped. Raises CorruptCheckpoint where the hub announced other bytes."""
        import huggingface_hub

        with telling_of(self._repository, self._revision):
            huggingface_hub.hf_hub_download(self._repository, file.name, revision=self._commit, local_dir=self._folder)
            announced = huggingface_hub.get_hf_file_metadata(self._url(file.name)).etag or ""
        if _SHA256.fullmatch(announced) and sha256_of(file) != announced:
            self.refuse(file)
            raise CorruptCheckpoint(f"{file}: the hub announced other bytes (SHA-256); the same command gets it anew")

    def refuse(self, file: Path) -> None:
        remove_file(file)

    def drop(self, file: Path) -> None:
        remove_file(file)
