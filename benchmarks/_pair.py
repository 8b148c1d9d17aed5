"""What the benchmarks share: contestants that are timed in turn, and the last line."""

from __future__ import annotations

import json
import time
from typing import Any

from qnext.bench import contest
from qnext.bench.contest import Contestants, Step, Worker, ratios

__all__ = ["Contestants", "Step", "Worker", "machine", "print_json", "ratios"]


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and when."""
    return {**contest.machine(), "date": time.strftime("%Y-%m-%d")}


def print_json(result: dict[str, Any]) -> None:
    """The last line of every benchmark."""
    print(json.dumps({**result, "machine": machine()}))
