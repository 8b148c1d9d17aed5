"""What a run of fine-tuning is asked for, and what every kind of it has read before it begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.files import write_file
from qnext.recipes.adapted import AdapterTask
from qnext.session.folder import TextFolder
from qnext.text.tokenizer import Tokenizer

_TASK = "task.json"


@dataclass(frozen=True)
class TuningTask:
    """What a run is asked for. It stands in the run's folder, so that the run can go on without being told again.

    `template` names a chat format for a folder that has none, or another than it has. `sampling` is what the result's
    generation_config.json recommends beside that of the base. `recipe` made the task, and examines the result.
    """

    base: str
    data: tuple[str, ...]
    template: str | None = None
    settings: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    adapter: AdapterTask | None = None  # what alone is trained; None: everything
    method: str = "sft"

    def write(self, folder: Path) -> None:
        write_file(folder / _TASK, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> TuningTask:
        """Raises UsageError where the folder holds no run, CorruptCheckpoint for a damaged one."""
        path = folder / _TASK
        if not path.is_file():
            raise UsageError(f"{folder} holds no run that could be resumed")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            adapter = None if value.get("adapter") is None else AdapterTask(**value["adapter"])
            lists = {"data": tuple(value["data"]), "settings": tuple(value["settings"])}
            return cls(**{**value, **lists, "adapter": adapter})
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptCheckpoint(f"{path}: malformed ({error})") from None


class RunData(Protocol):
    """What a run has read before it begins."""

    @property
    def task(self) -> TuningTask: ...

    @property
    def config(self) -> Any:
        """That of the method."""

    @property
    def train(self) -> Mapping[str, Any]:
        """Settings of TrainConfig."""

    @property
    def base(self) -> TextFolder: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def description(self) -> str: ...
