"""How fast are `qnext quantize` and `qnext init --scheme`, whole commands in turn, and what bounds them?

Sides: this checkout with the kernels of each instruction set asked for, this checkout by torch, and with
--baseline the interpreter of another checkout. torch is held to the same instruction set (ATEN_CPU_CAPABILITY). The
bounds beside them are measured too: reading the source and writing the result at the speed of the disk, and the
kernel alone, and the drawing of random numbers, on numbers in memory. The standard model is made on first use, 8 GB in
runs/standard. --init PRESET... makes a model in the scheme instead, with options of `qnext init` behind the preset.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from _pair import machine, print_json, ratios

from bench_inference import standard_model

ISAS = {"avx2": 1, "avx512": 2, "best": None}
_FORCE = "from qnext.ops.backends import cpu_kernels; cpu_kernels().force_isa({isa}); "
_CALL = "from qnext.cli import main; main()"


class Side(NamedTuple):
    name: str
    python: str
    code: str
    environment: dict[str, str]


class Ended(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    parameters_per_second: float
    worst_error: float | None  # the largest mean error of a kind of matrix; None where nobody reports it


def sides(options: argparse.Namespace) -> list[Side]:
    made = []
    for isa in options.isa:
        torch = {"ATEN_CPU_CAPABILITY": "avx2"} if isa == "avx2" else {}
        force = "" if ISAS[isa] is None else _FORCE.format(isa=ISAS[isa])
        made.append(Side(f"kernels, {isa}", sys.executable, force + _CALL, torch))
        if options.baseline is not None:
            made.append(Side(f"baseline, {isa}", options.baseline, force + _CALL, torch))
        if options.reference:
            made.append(Side(f"torch, {isa}", sys.executable, _CALL, {**torch, "QNEXT_BACKEND": "torch"}))
    return made


def run(side: Side, model: str, out: Path, options: argparse.Namespace) -> Ended:
    shutil.rmtree(out, ignore_errors=True)
    report = out.with_suffix(".json")
    report.unlink(missing_ok=True)
    command = [side.python, "-c", side.code]
    if options.init:
        command += ["init", options.init[0], str(out), *options.init[1:], "--scheme", options.scheme]
    else:
        command += ["quantize", model, str(out), "--scheme", options.scheme, "--report", str(report)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **side.environment}
    environment.pop("GOMP_SPINCOUNT", None)  # each side as it sets it itself
    told = options.work / "told"
    start = time.perf_counter()
    with told.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{side.name}: exit code {process.returncode}: {told.read_text()}")
    if options.init:
        count, worst = int(told.read_text().split(" parameters")[0].replace(",", "")), None
    else:
        count = num_parameters(model)
        worst = max(kind["mean_weight_error"] for kind in json.loads(report.read_text())["kinds"])
    shutil.rmtree(out)
    return Ended(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, count / seconds, worst)


def num_parameters(model: str) -> int:
    command = [sys.executable, "-m", "qnext", "inspect", model, "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return int(found["parameters"]["total"])


def bounds(options: argparse.Namespace) -> dict[str, float]:
    """Numbers per second of the kernel alone, and bytes per second to the disk."""
    import torch

    from qnext.ops import set_num_threads
    from qnext.quant.rounding import round_nearest
    from qnext.quant.scheme import find_scheme

    set_num_threads(options.threads)
    weight = (torch.randn(4096, 2048) * 0.02).bfloat16()
    scheme, times = find_scheme(options.scheme), []
    for _ in range(5):
        start = time.perf_counter()
        round_nearest(weight, scheme, scale_dtype=torch.bfloat16)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    torch.empty(1 << 22).normal_(std=0.02).bfloat16()
    drawn = (1 << 22) / (time.perf_counter() - start)
    path = options.work / "disk"
    block = os.urandom(1 << 24)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(32):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = 32 * len(block) / (time.perf_counter() - start)
    path.unlink()
    return {
        "kernel_numbers_per_second": weight.numel() / min(times),
        "drawn_numbers_per_second_and_thread": drawn,
        "disk_bytes_per_second": written,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the standard model")
    parser.add_argument("--init", nargs=argparse.REMAINDER, help="PRESET and options of qnext init; the last option")
    parser.add_argument("--scheme", default="int4-g32")
    parser.add_argument("--isa", nargs="+", choices=ISAS, default=["avx2", "best"])
    parser.add_argument("--baseline", metavar="PYTHON", help="interpreter of another checkout")
    parser.add_argument("--reference", action="store_true", help="by torch too; slow")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="folder for results, which are removed")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = "" if options.init else str(options.model or standard_model())
    limit = bounds(options)
    verb = " ".join(["init", *options.init] if options.init else ["quantize", model])
    print(f"{machine()['cpu']}, {options.threads} threads, qnext {verb} --scheme {options.scheme}")
    print(
        f"kernel alone {limit['kernel_numbers_per_second'] / 1e6:.0f} M numbers/s, "
        f"drawing {limit['drawn_numbers_per_second_and_thread'] / 1e6:.0f} M a thread, "
        f"disk {limit['disk_bytes_per_second'] / 1e6:.0f} MB/s written"
    )
    ended: dict[str, list[Ended]] = {}
    for round_ in range(options.rounds):
        for side in sides(options):
            each = run(side, model, options.work / "quantized", options)
            ended.setdefault(side.name, []).append(each)
            print(
                f"round {round_ + 1}  {side.name:<18} {each.seconds:7.1f} s   {each.cpu_seconds:7.1f} s of CPU   "
                f"{each.parameters_per_second / 1e6:6.1f} M parameters/s   peak {each.peak_bytes / 2**20:5.0f} MiB"
                + (f"   error {each.worst_error:.6f}" if each.worst_error is not None else ""),
                flush=True,
            )
    slower = {}
    for name, runs in ended.items():
        kind, isa = name.split(", ")
        if kind == "kernels":
            continue
        ours = ended[f"kernels, {isa}"]
        for what in ("seconds", "cpu_seconds"):
            ratio = ratios([getattr(each, what) for each in runs], [getattr(each, what) for each in ours])
            slower[f"{name}, {what}"] = ratio
            print(f"{name:<18} takes {ratio['median']:.1f} times the {what} ({ratio['min']:.1f}-{ratio['max']:.1f})")
    print_json(
        {
            "benchmark": "quantize",
            "scheme": options.scheme,
            "threads": options.threads,
            "command": verb,
            "limits": limit,
            "sides": {name: [each._asdict() for each in runs] for name, runs in ended.items()},
            "times_as_long": slower,
        }
    )


if __name__ == "__main__":
    main()
