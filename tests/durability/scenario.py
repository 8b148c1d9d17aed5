"""What was there before, the work, and what a reader finds: the form of every publication that is tried."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qnext.checkpoint.provenance import PROVENANCE_FILE, parsed
from qnext.cli import main
from qnext.files import is_partial
from tests.durability.faults import Outcome, run_child

ABSENT = "absent"
Work = Callable[[Path], object]


def digest(path: Path) -> Any:
    """All that is in a file or a folder, by name."""
    if not path.exists():
        return ABSENT
    if path.name == PROVENANCE_FILE:
        found = parsed(path.read_bytes())
        assert found is not None and found["cost"]["seconds"] >= 0
        return {**found, "cost": None}  # which differs from run to run
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return {str(file.relative_to(path)): digest(file) for file in sorted(path.rglob("*")) if file.is_file()}


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


class Scenario:
    """A publication. `work` runs in a child with a fault; the rest looks at what it left."""

    is_slow = False
    syncs = True  # what has a name survives a power failure

    def prepare(self, root: Path) -> None:
        """What is there before; in a child."""

    def work(self, root: Path) -> object:
        raise NotImplementedError

    def look(self, root: Path) -> Any:
        """What a reader finds: the same before and after as often as it is asked. Raises where something is broken."""
        raise NotImplementedError

    def again(self, root: Path) -> Outcome:
        """The same command once more, as a user would."""
        return run_child(root, lambda: self.work(root))

    def fault_of(self, seen: Any, before: Any, after: Any, outcome: Outcome) -> str | None:
        """What is wrong with what a reader finds behind a fault."""
        return None if seen in (before, after) else f"a reader finds {str(seen)[:300]}"

    def fault_at_end(self, root: Path, seen: Any, after: Any, again: Outcome) -> str | None:
        """What is wrong after the second run."""
        # A verb that makes something new says that it is there.
        if again.code != 0 and not (again.code == 2 and seen == after and "exists" in again.err):
            return f"the second run ends with {again.code}: {again.err[-300:]}"
        found = self.look(root)
        return None if found == after else f"after the second run a reader finds {str(found)[:300]}"

    def tells(self, outcome: Outcome, root: Path, code: int) -> str | None:
        """What is wrong with how a child told an error of the disk. Nothing where it went on without."""
        lines = outcome.err.splitlines()
        if outcome.code == 0:
            return None
        if outcome.code != code:
            return f"exit code {outcome.code}: {outcome.err[-300:]}"
        if len(lines) != 1 or str(root) not in lines[0] or ".partial-" in lines[0] or not lines[0].startswith("qnext "):
            return f"told as {outcome.err[-400:]!r}"
        return None


class Verb(Scenario):
    """A verb whose output is the same each time. `{}` in its arguments is the root."""

    def __init__(self, out: str, *arguments: str, makes_model: bool = False, before: Verb | None = None) -> None:
        self._out, self._arguments, self._makes_model, self._before = out, arguments, makes_model, before

    def prepare(self, root: Path) -> None:
        if self._makes_model:
            call(lambda root: main([word.replace("{}/out", f"{root}/model") for word in INIT_ARGUMENTS]), root)
        if self._before is not None:
            self._before.prepare(root)
            call(self._before.work, root)

    def work(self, root: Path) -> object:
        return main([argument.replace("{}", str(root)) for argument in self._arguments])

    def look(self, root: Path) -> Any:
        return digest(root / self._out)


class Call(Scenario):
    """A function of the library; its errors are told as the command line tells them."""

    def __init__(self, work: Work, look: Callable[[Path], Any], before: Work | None = None) -> None:
        self._work, self._look, self._before = work, look, before

    def prepare(self, root: Path) -> None:
        if self._before is not None:
            self._before(root)

    def work(self, root: Path) -> object:
        return as_a_verb(lambda: self._work(root))

    def look(self, root: Path) -> Any:
        return self._look(root)


def as_a_verb(work: Callable[[], object]) -> object:
    """Errors as the command line tells them."""
    from qnext.cli import doctor

    def command() -> None:
        work()

    doctor.command = command  # any verb will do: what is run is `work`
    return main(["doctor"])


def call(work: Callable[[Path], object], root: Path) -> None:
    try:
        work(root)
    except SystemExit as exit_:
        assert exit_.code == 0, exit_.code


def slow(scenario: Scenario) -> Scenario:
    scenario.is_slow = True
    return scenario


INIT_ARGUMENTS = (
    "init",
    "nano-5m",
    "{}/out",
    "--layers",
    "2",
    "--vocab-size",
    "300",
    "--experts",
    "2",
    "--experts-per-token",
    "1",
    "--no-mtp",
)


def left(root: Path) -> list[str]:
    """Hidden names of what was being made."""
    return [name for name in listing(root) if any(is_partial(Path(part)) for part in Path(name).parts)]


def scratch_of(root: Path) -> Path:
    """Where scratch folders go in a scenario, so that they are seen."""
    folder = root / "tmp"
    folder.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    return folder
