"""Do two commits compute the same, token for token and bit for bit? The exit code is 1 where anything differs.

The other commit is a checkout with a `.venv`, or an interpreter. Both digest, in processes of their own, 20 random
configurations (files, logits in fp32, bf16 and int4, gradients) and 200 random schedules of an engine: every answer
with its log-probabilities, and in which steps it came. Then the new commit goes on from the disk caches that the
baseline left, and both run once more without native kernels. Times are pinned, so that a commit equals itself.

    python benchmarks/check_same_bits.py --baseline ../base [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from same_bits.compare import first_difference, read_digests

PRODUCE = Path(__file__).resolve().parent / "_produce_bits.py"


class Half:
    """What one interpreter produces."""

    def __init__(self, name: str, python: Path, work: Path) -> None:
        self.name, self.python, self.work = name, python, work
        work.mkdir()

    def start(self, part: str, *options: object, backend: str | None = None) -> subprocess.Popen[bytes]:
        """A process that writes `<part>.jsonl`."""
        folder = self.work / part
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "0"}
        environment.pop("PYTHONPATH", None)
        if backend is not None:
            environment["QNEXT_BACKEND"] = backend
        command = [self.python, PRODUCE, "--out", self.file(part), "--work", folder, *options]
        return subprocess.Popen(list(map(str, command)), cwd=folder, env=environment)

    def file(self, part: str) -> Path:
        return self.work / f"{part}.jsonl"


def interpreter(given: Path) -> Path:
    """Of a checkout, or the file itself. Links stay: where an interpreter lies says which packages it sees."""
    return given.absolute() / ".venv" / "bin" / "python" if given.is_dir() else given.absolute()


def compare(title: str, old: Path, new: Path, *, only_common: bool = False) -> tuple[int, list[str]]:
    """How many digests were compared, and the first difference of each that differs."""
    left, right = read_digests(old), read_digests(new)
    names = [name for name in left if name != "commit" and (name in right or not only_common)]
    names += [name for name in right if name not in left]
    differences = []
    for name in names:
        if name not in left or name not in right:
            differences.append(f"{name}: missing in {'the baseline' if name not in left else 'the new commit'}")
        elif (found := first_difference(left[name], right[name])) is not None:
            differences.append(f"{name}{found}")
    print(f"{title}: {len(names) - len(differences)} of {len(names)} equal", flush=True)
    for line in differences[:10]:
        print(f"  {line}", flush=True)
    if len(differences) > 10:
        print(f"  and {len(differences) - 10} more")
    return len(names), differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, required=True, help="checkout with a .venv, or an interpreter")
    parser.add_argument("--new", type=Path, default=Path(sys.executable), help="the same; default: this interpreter")
    parser.add_argument("--quick", action="store_true", help="every configuration, and a fifth of the schedules")
    parser.add_argument("--keep", type=Path, help="leave the digests in this folder")
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="same-bits-") as scratch:
        root = Path(scratch) if given.keep is None else given.keep.absolute()
        root.mkdir(parents=True, exist_ok=True)
        result = run(interpreter(given.baseline), interpreter(given.new), root, is_quick=given.quick)
    seconds = round(time.perf_counter() - started)
    print(json.dumps({**result, "seconds": seconds}))
    sys.exit(1 if result["different"] or result["failed"] else 0)


def run(baseline: Path, new: Path, root: Path, *, is_quick: bool) -> dict[str, Any]:
    """Both halves side by side, part by part."""
    old_half, new_half = Half("baseline", baseline, root / "baseline"), Half("new", new, root / "new")
    caches = root / "caches"
    caches.mkdir()
    sizes = ["--configurations", 20, "--schedules", 40 if is_quick else 200]
    failed: list[str] = []

    def wait(**processes: subprocess.Popen[bytes]) -> None:
        failed.extend(f"{name} ended with {process.wait()}" for name, process in processes.items() if process.wait())

    wait(
        baseline=old_half.start("native", *sizes, "--keep", caches),
        new=new_half.start("native", *sizes),
    )
    for half in (old_half, new_half):
        print(f"{half.name}: {read_digests(half.file('native')).get('commit', {}).get('qnext', 'nothing')}")
    compared, different = compare("kernels", old_half.file("native"), new_half.file("native"))
    wait(new=new_half.start("exchanged", *sizes, "--only-disk", "--take", caches))
    more, differences = compare(
        "on the baseline's disk caches", old_half.file("native"), new_half.file("exchanged"), only_common=True
    )
    compared, different = compared + more, different + differences
    few = ["--configurations", 20, "--schedules", 10 if is_quick else 40]
    wait(  # by the older name of torch, which every baseline knows
        baseline=old_half.start("reference", *few, backend="reference"),
        new=new_half.start("reference", *few, backend="reference"),
    )
    more, differences = compare("without kernels", old_half.file("reference"), new_half.file("reference"))
    return {
        "compared": compared + more,
        "different": len(different + differences),
        "failed": failed,
        "first": (different + differences)[:1],
    }


if __name__ == "__main__":
    main()
