"""Runs scenarios with a fault at every step in turn. Argument: a folder to work in.

A program of its own, so that it can fork: it has no thread and never computes. Reads lines `KIND NAME` from standard
input and answers each with one JSON line {"steps": N, "faults": [...]}. Kinds are kill, full, broken and power.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tests.durability.faults import Fault, Outcome, lost_by_power, run_child
from tests.durability.scenario import Scenario, left, listing, scratch_of
from tests.durability.scenarios import SCENARIOS

_KINDS = {"kill": None, "full": errno.ENOSPC, "broken": errno.EIO}
_EXIT_CODES = {errno.ENOSPC: 4, errno.EIO: 2}
_MAX_STEPS = 1000


class Run:
    """One scenario with one kind of fault."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.base, self.root = folder / "base", folder / "root"
        shutil.rmtree(folder, ignore_errors=True)
        self.base.mkdir(parents=True)
        scratch_of(self.base)
        made = run_child(self.base, lambda: scenario.prepare(self.base))
        assert made.code == 0, made.err
        self.before = self._look(self.base, missing=None)
        self._fresh()
        self.clean = run_child(self.root, self._work_and_tell_modules)
        assert self.clean.code == 0, self.clean.err
        # What a child imports on its way, the others need not.
        for name in (self.root.parent / "modules").read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        self.after = self._look(self.root)
        self.listing = listing(self.root)
        assert not left(self.root), left(self.root)

    def _work_and_tell_modules(self) -> None:
        try:
            self.scenario.work(self.root)
        finally:
            names = [name for name in sys.modules if name.startswith(("qnext", "torch", "numpy", "typer", "rich"))]
            (self.root.parent / "modules").write_text("\n".join(names))

    def _fresh(self) -> None:
        """The root as it was before; its path is part of arguments, so it stays the same."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.base, self.root)
        scratch_of(self.root)

    def _look(self, root: Path, missing: Any = "?") -> Any:
        try:
            return self.scenario.look(root)
        except FileNotFoundError:
            if missing is None:
                return None
            raise

    def power(self) -> tuple[int, list[str]]:
        return len(self.clean.steps), lost_by_power(self.clean.steps) if self.scenario.syncs else []

    def strike(self, error: int | None) -> tuple[int, list[str]]:
        faults = []
        for number in range(_MAX_STEPS):
            self._fresh()
            outcome = run_child(self.root, lambda: self.scenario.work(self.root), Fault(number, error))
            if number >= len(outcome.steps) and outcome.code == 0:
                return number, faults
            step = outcome.steps[number] if number < len(outcome.steps) else None
            found = self._faults(outcome, error)
            faults += [f"step {number} of {self.scenario.__class__.__name__}, {step}: {text}" for text in found]
        return _MAX_STEPS, [*faults, "no end"]

    def _faults(self, outcome: Outcome, error: int | None) -> list[str]:
        scenario, found = self.scenario, []
        if error is not None:
            if outcome.code is None:
                return ["it died"]
            text = scenario.tells(outcome, self.root, _EXIT_CODES[error])
            found += [text] if text else []
            # What could not be deleted the next run finds; all else goes at once.
            if left(self.root) and outcome.steps and error == errno.ENOSPC:
                found.append(f"left behind: {left(self.root)}")
        elif outcome.code is not None:
            return ["it was not killed"]
        try:
            seen = self._look(self.root, missing=None)
            text = scenario.fault_of(seen, self.before, self.after, outcome)
            found += [text] if text else []
            again = scenario.again(self.root)
            text = scenario.fault_at_end(self.root, seen, self.after, again)
            found += [text] if text else []
        except Exception as broken:
            return [*found, f"{type(broken).__name__}: {broken}"]
        names = listing(self.root)
        if left(self.root):
            found.append(f"left behind after the second run: {left(self.root)}")
        elif {self._plain(name) for name in names} != {self._plain(name) for name in self.listing}:
            found.append(f"other files: {sorted(set(names) ^ set(self.listing))}")
        return found

    def _plain(self, name: str) -> str:
        """Numbers of rotated files and names of cache entries are not the same each time."""
        return name.split(".")[0] if name.startswith("audit") else "cache" if name.startswith("cache") else name


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        kind, _, name = line.strip().partition(" ")
        run = Run(SCENARIOS[name], folder / "work")
        num_steps, faults = run.power() if kind == "power" else run.strike(_KINDS[kind])
        print(json.dumps({"steps": num_steps, "faults": faults}), flush=True)


if __name__ == "__main__":
    main()
