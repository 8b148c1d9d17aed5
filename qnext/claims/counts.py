"""C1: how many parameters the model has, and how many a token multiplies, counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qnext.claims.claim import Findings, Grid, Workplace, exactly
from qnext.claims.notebook import Measured, Point
from qnext.config import preset
from qnext.model import CausalLM
from qnext.planning import count_active, count_parameters

_BILLION = 1e9


@dataclass(frozen=True)
class Counting:
    """The module with its real shapes and no memory: nothing is derived from a formula alone."""

    presets: tuple[str, ...]

    def points(self, at: Workplace) -> Iterable[Point]:
        return [Point(f"counts/{name}", {}, partial(_count, name)) for name in self.presets]

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        found = {name: known[f"counts/{name}"].value for name in self.presets if f"counts/{name}" in known}
        rows = [
            [name, f"{each['module']:,}", f"{each['trunk']:,}", f"{each['active']:,}", f"{each['active_with_head']:,}"]
            for name, each in found.items()
        ]
        values = {}
        if (own := found.get("80b-a3b")) is not None:
            assert own["module"] == own["planned"], own
            values = {
                "total_billion": exactly(own["trunk"] / _BILLION),
                "active_billion": exactly(own["active"] / _BILLION),
                "active_percent": exactly(100 * own["active"] / own["trunk"]),
            }
        header = ["model", "module, MTP included", "without MTP", "active without the head", "with the head"]
        return Findings(
            "`CausalLM` of each preset on the meta device; the planner's list of parameters gives the same sums.",
            values,
            [Grid("Parameters", header, rows)],
            notes=[
                "A token multiplies ten routed experts, the shared one, both mixers' matrices and the router of each "
                "layer. Embedding rows are looked up. The published 3.7 % is 3 over 80, both rounded."
            ],
        )


def _count(name: str) -> dict[str, Any]:
    config = preset(name)
    with torch.device("meta"):
        model = CausalLM(config)
    counts, active = count_parameters(config), count_active(config)
    return {
        "module": sum(parameter.numel() for parameter in model.parameters()),
        "planned": counts.total,
        "trunk": counts.trunk,
        "active": active.without_head,
        "active_with_head": active.with_head,
    }
