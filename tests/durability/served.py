"""Publications of the server and its client: keys, the audit log, batches, prefixes on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qnext.cli import main
from qnext.client.batch_files import BatchOutput
from qnext.server.access.audit import AuditLog, AuditRecord
from qnext.server.access.audit_reading import verify_chain
from qnext.server.access.keys import KeyStore
from tests.durability.faults import Outcome, run_child
from tests.durability.scenario import INIT_ARGUMENTS, Scenario, as_a_verb, call


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
        call(lambda root: main([word.replace("{}/out", f"{root}/model") for word in INIT_ARGUMENTS]), root)
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


def answer(name: str) -> dict[str, Any]:
    return {"id": "batch_req_1", "custom_id": name, "response": {"status_code": 200, "body": {}}, "error": None}
