"""Everything that the package puts on a disk, each as what was there before, the work, and what a reader finds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qnext.checkpoint import save_model
from qnext.checkpoint.snapshot import Snapshot, newest_snapshot, save_snapshot
from qnext.cli import main
from qnext.cli._batch_files import BatchOutput
from qnext.cli.demo import _remove_earlier
from qnext.files import is_partial, write_file
from qnext.recipes import RECIPES
from qnext.recipes.recipe import is_run, prepare
from qnext.server.audit import AuditLog, AuditRecord, verify_chain
from qnext.server.keys import KeyStore
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.cli.test_train import tiny_recipe
from tests.durability.faults import Outcome, Step, run_child, without_exchange
from tests.training.models import tiny_model

RECIPES["tiny"] = tiny_recipe
ABSENT = "absent"
Work = Callable[[Path], object]


def digest(path: Path) -> Any:
    """All that is in a file or a folder, by name."""
    if not path.exists():
        return ABSENT
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
            call(lambda root: main([word.replace("{}/out", f"{root}/model") for word in _INIT]), root)
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


class Replaced(Call):
    """A model in the place of another. Where the system cannot exchange, the old one may wait for the next run."""

    def __init__(self, *, exchanges: bool) -> None:
        super().__init__(
            lambda root: save_model(other_model(), root / "m", overwrite=True, readme="new"),
            lambda root: digest(root / "m"),
            lambda root: save_model(tiny_model(), root / "m"),
        )
        self._exchanges = exchanges

    def work(self, root: Path) -> object:
        with nullcontext() if self._exchanges else without_exchange():
            return super().work(root)

    def fault_of(self, seen: Any, before: Any, after: Any, outcome: Outcome) -> str | None:
        if not self._exchanges and seen == ABSENT and outcome.code is None:
            return None
        return super().fault_of(seen, before, after, outcome)


class Train(Scenario):
    """A whole run: the model that comes out is the same, bit for bit, whatever happened on the way."""

    is_slow = True

    def __init__(self, *settings: str) -> None:
        self._settings = [word for setting in settings for word in ("--set", setting)]

    def _run(self, root: Path, *more: str) -> object:
        return main(["train", "tiny", "--out", str(root / "run"), *self._settings, *more])

    def work(self, root: Path) -> object:
        return self._run(root)

    def again(self, root: Path) -> Outcome:
        first = run_child(root, lambda: self._run(root))
        return run_child(root, lambda: self._run(root, "--resume")) if first.code == 2 else first

    def look(self, root: Path) -> Any:
        newest_snapshot(root / "run" / "snapshots")
        return digest(root / "run" / "model")

    def tells(self, outcome: Outcome, root: Path, code: int) -> str | None:
        """The run goes on without a snapshot or a line of metrics, and says so; the rest of stderr is its progress."""
        told = [line for line in outcome.err.splitlines() if line.startswith("qnext ")]
        struck = [step for step in outcome.steps if step not in outcome.done]
        # A folder that is there need not be made, and what cannot be deleted waits for the next run.
        matters = any(step.call not in ("mkdir", "unlink", "rmdir") and not self._removes(step) for step in struck)
        if "Traceback" in outcome.err or (matters and not told) or any(".partial-" in line for line in told):
            return f"told as {outcome.err[-400:]!r}"
        return None if outcome.code in (0, code) else f"exit code {outcome.code}"

    def _removes(self, step: Step) -> bool:
        """Of an old snapshot: its rename, or the flush of the names around it."""
        is_rename = step.call == "rename" and step.before is not None and ".partial-" not in step.before
        return is_rename or (step.call == "fsync" and step.path.endswith("/snapshots"))


class Keys(Scenario):
    """The file of keys, by what it lets in."""

    def __init__(self, act: str) -> None:
        self._act = act

    def prepare(self, root: Path) -> None:
        KeyStore(root / "keys.json").create("first")

    def work(self, root: Path) -> object:
        file = ["--file", str(root / "keys.json")]
        if self._act == "create":
            return main(["keys", "create", "--name", "second", *file])
        return main(["keys", self._act, KeyStore(root / "keys.json").keys()[0].id, *file])

    def look(self, root: Path) -> Any:
        keys = KeyStore(root / "keys.json").keys()
        (first,) = json.loads((root.parent / "base" / "keys.json").read_text())["keys"]
        assert keys[0].id == first["id"] and (root / "keys.json").stat().st_mode & 0o777 == 0o600
        return [len(keys), keys[0].revoked, keys[0].digest == first["digest"]]

    def fault_at_end(self, root: Path, seen: Any, after: Any, again: Outcome) -> str | None:
        if self._act == "create":
            after = [seen[0] + 1, *seen[1:]]
        elif self._act == "revoke" and seen == after and "is revoked" in again.err:
            return None
        return super().fault_at_end(root, seen, after, again)


class Audit(Scenario):
    """The audit log, with its chain, through rotations: no line that was written is lost."""

    syncs = False  # a line is not flushed: the disk would be the limit of the server

    def work(self, root: Path) -> object:
        log = AuditLog(root / "audit", max_bytes=1200, keep=9, chain=True)
        for number in range(5):
            log.write(AuditRecord(f"r{number}", "/v1/models", "GET", 200))
        print(5 - log.num_failed)
        return log.close()

    def look(self, root: Path) -> Any:
        if not list(root.glob("audit*")):
            return 0
        check = verify_chain(root / "audit")
        assert check.error is None, check.error
        return check.num_lines

    def fault_of(self, seen: Any, before: Any, after: Any, outcome: Outcome) -> str | None:
        written = int(outcome.out) if outcome.code == 0 else sum(step.call == "write" for step in outcome.done)
        return None if seen == written else f"{seen} lines, but {written} were written"

    def fault_at_end(self, root: Path, seen: Any, after: Any, again: Outcome) -> str | None:
        found = self.look(root)
        return None if again.code == 0 and found == seen + 5 else f"{found} lines after the second run, before {seen}"

    def tells(self, outcome: Outcome, root: Path, code: int) -> str | None:
        """A log that cannot be opened is an error of the start; later the server goes on and counts what is lost."""
        is_told = "audit log" in outcome.err or outcome.out == "5\n" if outcome.code == 0 else "OSError" in outcome.err
        return None if is_told else f"told as {outcome.err[-300:]!r}"


class Batch(Scenario):
    """Answers of a batch, in a file that an earlier run left with a failed one and a torn line."""

    syncs = False  # a line that a power failure takes is asked for again
    ids = tuple(f"id{number}" for number in range(5))

    def prepare(self, root: Path) -> None:
        with BatchOutput(str(root / "out.jsonl")) as output:
            output.write(answer("id1"))
            output.write({**answer("id2"), "response": None, "error": {"code": "x", "message": "y"}})
        with (root / "out.jsonl").open("ab") as file:
            file.write(b'{"id":"batch_req_')

    def work(self, root: Path) -> object:
        def run() -> None:
            with BatchOutput(str(root / "out.jsonl")) as output:
                for name in self.ids:
                    if name not in output.answered:
                        output.write(answer(name))

        return as_a_verb(run)

    def look(self, root: Path) -> Any:
        found = []
        for line in (root / "out.jsonl").read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n") and json.loads(line)["response"] is not None:
                found.append(json.loads(line)["custom_id"])
        assert len(set(found)) == len(found) and "id1" in found
        return sorted(found)

    def fault_of(self, seen: Any, before: Any, after: Any, outcome: Outcome) -> str | None:
        number = 1 + sum(step.call == "write" and ".partial-" not in step.path for step in outcome.done)
        return None if len(seen) == number else f"{len(seen)} answers, but {number} were written"


class RunBatch(Batch):
    """The same by the verb, with a model that answers."""

    is_slow = True

    def prepare(self, root: Path) -> None:
        super().prepare(root)
        call(lambda root: main([word.replace("{}/out", f"{root}/model") for word in _INIT]), root)
        body = {"model": "model", "prompt": "def", "max_tokens": 2, "temperature": 0}
        lines = [{"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body} for name in self.ids]
        (root / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def work(self, root: Path) -> object:
        files = ["-i", str(root / "in.jsonl"), "-o", str(root / "out.jsonl")]
        return main(["run-batch", str(root / "model"), *files, "--max-num-seqs", "2", "--threads", "1"])

    def tells(self, outcome: Outcome, root: Path, code: int) -> str | None:
        """Beside the plan of the memory and what came of the batch."""
        told = [line for line in outcome.err.splitlines(keepends=True) if line.startswith(("qnext", "Traceback"))]
        return super().tells(replace(outcome, err="".join(told)), root, code)


class DiskCache(Scenario):
    """Prefixes on disk: written, read, evicted. What is there can be read, what is damaged does not exist."""

    syncs = False  # a name that a power failure takes back is an entry less

    def work(self, root: Path) -> object:
        from qnext.engine.storage.disk import DiskStore
        from tests.engine.disk_kills import contents

        with DiskStore(root / "cache", max_bytes=500_000, fingerprint=b"m") as store:
            for token in (3, 5, 9, 11, 3):
                store.put("kv", b"", [token], contents(token))
                store.flush()
        return None

    def look(self, root: Path) -> Any:
        seen = run_child(root, lambda: self._read(root))
        assert seen.code == 0, seen.err
        return json.loads(seen.out)

    def _read(self, root: Path) -> None:
        from qnext.engine.storage.disk import DiskStore
        from tests.engine.disk_kills import contents

        with DiskStore(root / "cache", max_bytes=500_000, fingerprint=b"m") as store:
            found = []
            for token in (3, 5, 9, 11):
                got = store.get("kv", b"", [token])
                assert got is None or got["x"].equal(contents(token)["x"])
                found += [token] if got is not None else []
            assert len(found) == store.statistics().num_entries
        print(json.dumps(found))

    def fault_of(self, seen: Any, before: Any, after: Any, outcome: Outcome) -> str | None:
        return None

    def tells(self, outcome: Outcome, root: Path, code: int) -> str | None:
        """No request fails by it: the store warns once."""
        return None if outcome.code == 0 or "UsageError" in outcome.err else outcome.err


class DemoAgain(Scenario):
    """An earlier demo goes and a run begins in its place."""

    def prepare(self, root: Path) -> None:
        prepare(tiny_recipe(), root / "run")
        (root / "run" / "metrics.jsonl").write_text("{}\n")

    def work(self, root: Path) -> object:
        def begin() -> None:
            _remove_earlier(root / "run")
            prepare(tiny_recipe(), root / "run")

        return as_a_verb(begin)

    def look(self, root: Path) -> Any:
        return is_run(root / "run") and not (root / "run" / "metrics.jsonl").exists()

    def fault_of(self, seen: Any, before: Any, after: Any, outcome: Outcome) -> str | None:
        return None  # what goes may be gone; that the next run begins is what counts


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


def other_model() -> Any:
    return tiny_model(seed=5, num_nextn_predict_layers=0)


def answer(name: str) -> dict[str, Any]:
    return {"id": "batch_req_1", "custom_id": name, "response": {"status_code": 200, "body": {}}, "error": None}


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"model": {"w": torch.full((4,), float(step))}, "random": {"cpu": torch.ones(3)}}, {})


def newest_step(root: Path) -> Any:
    found = newest_snapshot(root / "snapshots")
    if found is None:
        return ABSENT
    assert found[1].tensors["model"]["w"].tolist() == [float(found[1].step)] * 4
    return found[1].step


def save(step: int, *, keep: int = 1) -> Callable[[Path], object]:
    return lambda root: save_snapshot(root / "snapshots", snapshot(step), keep=keep)


def begin(root: Path) -> object:
    if not is_run(root / "run"):
        return prepare(tiny_recipe(), root / "run")
    return prepare(tiny_recipe(), root / "run", resume=True)


def slow(scenario: Scenario) -> Scenario:
    scenario.is_slow = True
    return scenario


_INIT = (
    "init", "nano-5m", "{}/out", "--layers", "2", "--vocab-size", "300", "--experts", "2", "--experts-per-token", "1",
    "--no-mtp",
)  # fmt: skip
_GGUF = Verb("m.gguf", "convert", "{}/model", "{}/m.gguf", "--type", "q8_0", makes_model=True)

SCENARIOS: dict[str, Scenario] = {
    "snapshot": Call(save(2), newest_step, save(1)),
    "same snapshot again": Call(save(1), newest_step, save(1)),
    "first snapshot": Call(save(1), newest_step),
    "file": Call(lambda root: write_file(root / "f", "new"), lambda root: digest(root / "f")),
    "file replaced": Call(
        lambda root: write_file(root / "f", "new"), lambda root: digest(root / "f"),
        lambda root: write_file(root / "f", "old"),
    ),
    "tokenizer": Call(
        lambda root: save_tokenizer(byte_level_tokenizer(), root / "deep" / "t", model_max_length=9, chat_template="x"),
        lambda root: digest(root / "deep" / "t"),
    ),
    "run begun": Call(begin, lambda root: is_run(root / "run")),
    "demo again": DemoAgain(),
    "model replaced": Replaced(exchanges=True),
    "model replaced without exchange": Replaced(exchanges=False),
    "keys create": Keys("create"),
    "keys revoke": Keys("revoke"),
    "keys rotate": Keys("rotate"),
    "audit": Audit(),
    "batch": Batch(),
    "run-batch": RunBatch(),
    "disk cache": slow(DiskCache()),
    "init": slow(Verb("out", *_INIT)),
    "quantize": slow(Verb("q", "quantize", "{}/model", "{}/q", "--scheme", "int8-g32", makes_model=True)),
    "to gguf": slow(_GGUF),
    "from gguf": slow(Verb("back", "convert", "{}/m.gguf", "{}/back", before=_GGUF)),
    "logits": slow(Verb("l.npy", "logits", "{}/model", "--tokens", "1,2,3", "--out", "{}/l.npy", makes_model=True)),
    "train": Train(
        "total_steps=2", "snapshot_every=1", "keep_snapshots=1", "eval_every=0", "model.num_hidden_layers=1",
        "model.num_experts=2", "model.num_nextn_predict_layers=0",
    ),
}  # fmt: skip


def left(root: Path) -> list[str]:
    """Hidden names of what was being made."""
    return [name for name in listing(root) if any(is_partial(Path(part)) for part in Path(name).parts)]


def scratch_of(root: Path) -> Path:
    """Where scratch folders go in a scenario, so that they are seen."""
    folder = root / "tmp"
    folder.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    return folder
