"""What a machine was found to take for steps, kept in a file of its own. No torch.

The file lies in the user's cache folder and is named by the machine: processor, cores, memory, threads and version of
qnext. One that is damaged, or of another form, is ignored with a warning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext.errors import warn
from qnext.files import new_file
from qnext.planning import machine
from qnext.planning.speed_model import SpeedModel
from qnext.planning.step_load import Peaks, StepLoad
from qnext.version import __version__

_FORM = 2
# The arithmetic that weights of a precision are multiplied in at best, as ops.limits names it.
_ARITHMETIC = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int8", "fp8": "float32"}


@dataclass(frozen=True)
class Calibration:
    """`speeds` are by precision of the weights (fp32, bf16, int8, int4), `errors` the median relative errors of the fit
    to its own measurements. `bandwidth` and `operations` are the measured limits, the latter None where the processor
    has no such arithmetic; `cache_bytes` is its largest cache."""

    date: str
    source: str
    threads: int
    speeds: Mapping[str, SpeedModel]
    errors: Mapping[str, Mapping[str, float]]
    bandwidth: float
    operations: Mapping[str, float | None]
    cache_bytes: int

    def peaks(self, precision: str) -> Peaks:
        """What bounds weights of this precision; without an arithmetic of their own they are multiplied in fp32."""
        found = self.operations.get(_ARITHMETIC[precision]) or self.operations["float32"]
        assert found is not None  # every processor multiplies fp32
        return Peaks(self.bandwidth, found)

    @property
    def told(self) -> str:
        """Where it is from, in a line."""
        plural = "s" if self.threads > 1 else ""
        return f"calibrated {self.date} from {self.source} with {self.threads} thread{plural}"


def calibration_file(threads: int, folder: Path | None = None) -> Path:
    """Of this machine with so many threads."""
    cpu = machine.processor()
    facts = (cpu.name, cpu.generation, cpu.features, cpu.num_usable, machine.total_bytes() >> 28, threads, __version__)
    name = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    return (folder or Path.home() / ".cache" / "qnext") / f"machine-{name}.json"


def write_calibration(path: Path, found: Calibration) -> None:
    speeds = {
        name: {"decode": each.decode._asdict(), "prefill": each.prefill._asdict()}
        for name, each in found.speeds.items()
    }
    document = {"form": _FORM, **vars(found), "speeds": speeds}
    with new_file(path, with_parents=True) as file:
        file.write(json.dumps(document, indent=2).encode())


def read_calibration(path: Path) -> Calibration | None:
    """None where there is none, or none that can be used."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("form") != _FORM:
            raise ValueError("another form")
        speeds = {name: _speed(each) for name, each in values.pop("speeds").items()}
        found = Calibration(speeds=speeds, **values)
        found.peaks("fp32")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        warn(f"{path}: no calibration that can be read ({error}); `qnext plan --calibrate` makes a new one")
        return None


def _speed(values: Mapping[str, Any]) -> SpeedModel:
    decode, prefill = (StepLoad(**values[kind]) for kind in ("decode", "prefill"))
    for number in (*decode, *prefill):
        if not (isinstance(number, (int, float)) and 0 <= number < float("inf")):
            raise ValueError(f"{number!r} is no time")
    return SpeedModel(decode, prefill)
