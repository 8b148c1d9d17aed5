"""The load of a model's experts on a known text, kept in a file, and how far a later load is from it.

Legend: L sparse layers, E experts, B blocks of neighbouring tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.errors import UsageError, line_of
from qnext.files import write_file
from qnext.planning.expert_shape import expert_shape

_FORM = "qnext expert baseline 1"


class Distances(NamedTuple):
    """float64 [L] each. `distance_L` is the total variation of two loads, 0 to 1. `noise_L` is what it is on average
    for samples of this size, of texts as varied as those of the baseline."""

    distance_L: NDArray[np.float64]
    noise_L: NDArray[np.float64]


@dataclass(frozen=True)
class ExpertBaseline:
    """`counts_LE` are the tokens of each expert of the layers with these indices. `spread_L` is how much more the
    counts of blocks vary than independent choices would: 1 is as much."""

    model: str
    layers: tuple[int, ...]
    counts_LE: NDArray[np.int64]
    spread_L: NDArray[np.float64]

    @classmethod
    def of_blocks(cls, model: str, layers: Sequence[int], counts_BLE: NDArray[np.int64]) -> ExpertBaseline:
        """From the counts of the blocks of a text."""
        counts_LE = counts_BLE.sum(axis=0)
        size_BL1 = counts_BLE.sum(axis=2, keepdims=True)
        share_LE = counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)
        squares_L = ((counts_BLE - size_BL1 * share_LE) ** 2).sum(axis=(0, 2))
        expected_L = (size_BL1 * share_LE * (1 - share_LE)).sum(axis=(0, 2))
        # One number is fitted to the blocks: their mean.
        blocks = max(1, len(counts_BLE) - 1) / len(counts_BLE)
        spread_L = np.divide(squares_L, expected_L * blocks, out=np.ones(len(counts_LE)), where=expected_L > 0)
        return cls(model, tuple(layers), counts_LE, spread_L)

    @property
    def entropy_L(self) -> NDArray[np.float64]:
        return expert_shape(self.counts_LE).entropy_L

    def check(self, layers: Sequence[int], num_experts: int, *, where: str) -> None:
        """Raises UsageError where the baseline is of a model of other layers with experts; that which drafts is none of
        them."""
        if set(self.layers) != set(layers) or self.counts_LE.shape[1] != num_experts:
            raise UsageError(
                f"{where}: a baseline of {len(self.layers)} layers of {self.counts_LE.shape[1]} experts, but the model "
                f"has {len(layers)} of {num_experts}"
            )

    def distances(self, counts_LE: NDArray[np.int64]) -> Distances:
        """Of the counts of the same layers."""
        mine_L1, its_L1 = (counts.sum(axis=1, keepdims=True) for counts in (self.counts_LE, counts_LE))
        share_LE, its_share_LE = self.counts_LE / np.maximum(mine_L1, 1), counts_LE / np.maximum(its_L1, 1)
        pooled_LE = (self.counts_LE + counts_LE) / np.maximum(mine_L1 + its_L1, 1)
        per_choice_L1 = self.spread_L[:, None] * (1 / np.maximum(mine_L1, 1) + 1 / np.maximum(its_L1, 1))
        deviation_LE = np.sqrt(pooled_LE * (1 - pooled_LE) * per_choice_L1)
        # The mean size of a normal deviation is sqrt(2 / pi) of its standard deviation.
        noise_L = math.sqrt(2 / math.pi) * deviation_LE.sum(axis=1) / 2
        return Distances(np.abs(share_LE - its_share_LE).sum(axis=1) / 2, noise_L)

    def write(self, path: Path) -> None:
        layers = [
            {"layer": layer, "spread": round(float(spread), 6), "counts": counts.tolist()}
            for layer, spread, counts in zip(self.layers, self.spread_L, self.counts_LE, strict=True)
        ]
        document = {"form": _FORM, "model": self.model, "layers": layers}
        write_file(path, json.dumps(document) + "\n")

    @classmethod
    def read(cls, path: Path) -> ExpertBaseline:
        """Raises UsageError naming the file for one that is no baseline."""
        try:
            document = json.loads(path.read_bytes())
            if document["form"] != _FORM:
                raise UsageError(f"{path}: no baseline of experts that is known here")
            rows = [_row(row) for row in document["layers"]]
            if len({len(counts) for _, counts, _ in rows}) != 1:
                raise UsageError(f"{path}: no layers, or layers of different numbers of experts")
            layers, counts, spread = zip(*rows, strict=True)
            return cls(str(document["model"]), layers, np.array(counts), np.array(spread))
        except OSError as error:
            raise UsageError(line_of(error)) from None
        except (ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path}: no baseline of experts, as `qnext experts --save-baseline` writes it") from None


def _row(row: Any) -> tuple[int, list[int], float]:
    counts, spread = row["counts"], float(row["spread"])
    if not all(type(count) is int and 0 <= count < 1 << 53 for count in counts) or not 0 <= spread < math.inf:
        raise ValueError("counts")
    return int(row["layer"]), counts, spread
