"""A record of the audit log beside a model folder: whether its answer can be computed again with it, here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_SAME_FILES = ("model", "tokenizer", "template", "adapter")


class Difference(NamedTuple):
    """What a record says of one thing, and what is here. `is_of_files`: of the given folders."""

    name: str
    recorded: str | None
    here: str | None
    is_of_files: bool

    @property
    def is_equal(self) -> bool:
        return self.recorded == self.here


def compare_origin(trace: Mapping[str, Any], model: str, adapter: Path | None) -> list[Difference]:
    """Each thing that the answer depended on, beside that of the folders and of this machine.

    Raises ModelNotFound and CorruptCheckpoint.
    """
    import torch

    from qnext.checkpoint.adapters import find_adapter, read_adapter
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.identity import identity_of
    from qnext.checkpoint.resolve import resolve_model
    from qnext.lora.serving import fingerprint
    from qnext.ops import arithmetic_of
    from qnext.version import __version__

    layout = read_layout(resolve_model(model))
    folder = None if adapter is None else find_adapter(adapter)
    here = {
        **identity_of(layout)._asdict(),
        "adapter": None if folder is None else fingerprint(read_adapter(folder, layout.config)),
        "version": __version__,
        "arithmetic": arithmetic_of(torch.device("cpu")),
    }
    if trace["template"] is not None and here["template"] is None and folder is not None:
        here |= identity_of(layout, folder)._asdict()  # chats were written as the adapter was trained
    return [Difference(name, trace.get(name), here[name], name in _SAME_FILES) for name in here]
