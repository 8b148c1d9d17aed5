"""What earlier runs of a model have told of its experts, and which rank has which of them then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qnext.parallel.placement import ExpertPlacement, place_by_load
from qnext.planning.expert_baseline import ExpertBaseline
from qnext.session.rank_options import AUTO, EVEN, RankOptions

if TYPE_CHECKING:
    from qnext.config import ModelConfig
    from qnext.engine.execution.expert_load import ExpertCounts
    from qnext.session.folder import ModelFolder

FILE_NAME = ".qnext-expert-loads.json"  # in the model's folder, in the form of ExpertBaseline


def find_placement(folder: ModelFolder, options: RankOptions, note: Callable[[str], None]) -> ExpertPlacement | None:
    """None: each rank has as many neighbours as the others. Raises UsageError for a file that is no baseline of this
    model. `note` is told where no loads are known."""
    if options.placement == EVEN:
        return None
    path = folder.path / FILE_NAME if options.placement == AUTO else Path(options.placement)
    if options.placement == AUTO and not path.is_file():
        copies = ", and none has copies" if options.copies else ""
        note(
            f"no loads of experts are known, so they are placed evenly{copies}; this run leaves its loads in {path}, "
            f"`qnext experts {folder.path} --text FILE --save-baseline {path}` measures them"
        )
        return None
    baseline = _read(path, folder.config)
    loads = dict(zip(baseline.layers, baseline.counts_LE.tolist(), strict=True))
    return place_by_load(loads, num_ranks=options.num_ranks, num_copies=options.copies)


def keep_loads(folder: ModelFolder, counts: ExpertCounts | None) -> None:
    """Add the tokens of a run to what is known; without a word where the folder cannot be written."""
    layers = _sparse_layers(folder.config)
    if counts is None or not counts.total_LE.any():
        return
    rows = [counts.layers.index(layer) for layer in layers]
    counts_LE = counts.total_LE[rows]
    path = folder.path / FILE_NAME
    with contextlib.suppress(ValueError):  # as nothing: it is of another model, or damaged
        known = _read(path, folder.config)
        counts_LE = counts_LE + known.counts_LE[[known.layers.index(layer) for layer in layers]]
    with contextlib.suppress(OSError):
        ExpertBaseline(folder.path.name, tuple(layers), counts_LE, np.ones(len(layers))).write(path)


def _read(path: Path, config: ModelConfig) -> ExpertBaseline:
    """Raises UsageError."""
    baseline = ExpertBaseline.read(path)
    baseline.check(_sparse_layers(config), config.num_experts, where=str(path))
    return baseline


def _sparse_layers(config: ModelConfig) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
