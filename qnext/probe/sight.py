"""What is wanted of a model: which taps are kept, changed or observed.

Legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qnext import ops
from qnext.config import ModelConfig
from qnext.model import Batch
from qnext.probe.attending import Attended
from qnext.probe.captures import Captures, KeptRows
from qnext.probe.edits import Edit
from qnext.probe.names import is_between_ops, match
from qnext.probe.passing import FromRows, Passing, as_it_is
from qnext.probe.rows import BatchRows, SequenceName, Where


class DeltaSeen(NamedTuple):
    """What a call of Gated DeltaNet was computed from, and the states of its sequences."""

    inputs: ops.DeltaInputs
    steps: Mapping[str, Tensor]
    before_NHKV: Tensor | None  # None without a cache: zeros
    after_NHKV: Tensor | None  # None without a cache


class Observer(Protocol):
    """Is told of layers in a call: of the kinds in `sees`, which are "residual", "attention" and "delta".

    `prefix` names the layer. `steps` are those of its mixer, by name.
    """

    sees: Collection[str]

    def see_residual(self, prefix: str, rows: BatchRows, hidden_TD: Tensor) -> None: ...

    def see_attention(
        self, prefix: str, rows: BatchRows, attended: Sequence[Attended], steps: Mapping[str, Tensor]
    ) -> None: ...

    def see_delta(self, prefix: str, rows: BatchRows, seen: DeltaSeen) -> None: ...


class Sight:
    """Shared by the hooks of a model. `wanted` are the taps that something is done with."""

    def __init__(
        self,
        config: ModelConfig,
        taps: Mapping[str, Where],
        edits: Sequence[Edit],
        *,
        observer: Observer | None = None,
        keeps_gradients: bool = False,
    ) -> None:
        self.captures = Captures()
        self.observer, self.keeps_gradients = observer, keeps_gradients
        self.names: dict[int, SequenceName] = {}  # of the sequences in the slots
        self._wheres = {name: where for pattern, where in taps.items() for name in match([pattern], config)}
        edited = match([edit.tap for edit in edits], config)
        self._edits = {name: [each for each in edits if fnmatchcase(name, each.tap)] for name in edited}
        self.wanted = frozenset([*self._wheres, *self._edits])
        self.edited = frozenset(self._edits)
        self._last: tuple[Tensor, BatchRows] | None = None
        self._passing: Passing | None = None
        only_looks = not self.edited and observer is None and not keeps_gradients
        # Whether a replay of a call computes all that is wanted: nothing is changed, and nothing made beside it.
        self.is_replayable = only_looks and all(map(is_between_ops, self.wanted))

    def observes(self, kind: str) -> bool:
        return self.observer is not None and kind in self.observer.sees

    def rows_of(self, batch: Batch) -> BatchRows:
        """The same object for all layers of a call."""
        if self._last is None or self._last[0] is not batch.positions_T:
            self._last = batch.positions_T, BatchRows.of(batch, self.names)
        return self._last[1]

    def show(self, tap: str, x_T: Tensor, rows: BatchRows) -> Tensor:
        """What the next step takes: `x_T` itself where nothing changes."""
        if tap not in self.wanted:
            return x_T
        for edit in self.edits_of(tap):
            x_T = edit.apply(x_T, rows)
        self.keep(tap, x_T, rows)
        return x_T

    def edits_of(self, tap: str) -> Sequence[Edit]:
        return self._edits.get(tap, ())

    def keep(self, tap: str, x_T: Tensor, rows: BatchRows, make: FromRows = as_it_is) -> None:
        """Keeps what `make` gives, row by row."""
        if (where := self._wheres.get(tap)) is None:
            return
        if self._passing is not None:
            self._passing.add(tap, x_T, rows, make)
            return
        chosen_R = rows.chosen(where)
        # Kernels may write again where they wrote: what is kept is a copy.
        values_R = x_T.clone() if chosen_R is None else x_T.index_select(0, chosen_R)
        self._put(tap, KeptRows(rows, chosen_R, make(values_R)))

    def keep_made(self, tap: str, rows: BatchRows, make: Callable[[Tensor], Tensor]) -> None:
        """Keeps what `make` gives for the rows that are to be kept, where there are any."""
        if (where := self._wheres.get(tap)) is not None:
            chosen_R = rows.chosen(where)
            if chosen_R is None:
                chosen_R = torch.arange(rows.packing.num_tokens, device=rows.packing.device)
            if len(chosen_R):
                self._put(tap, KeptRows(rows, chosen_R, make(chosen_R)))

    def _put(self, tap: str, piece: KeptRows) -> None:
        values_R = piece.values_R if self.keeps_gradients else piece.values_R.detach()
        self.captures.put(tap, piece._replace(values_R=values_R))

    def show_rows(self, tap: str, x_R: Tensor) -> Tensor:
        """Of rows that nobody can tell the tokens of: the logits."""
        for edit in self.edits_of(tap):
            x_R = edit.of_rows(x_R)
        if self._passing is not None and tap in self._wheres:
            self._passing.add(tap, x_R, None, as_it_is)
        elif tap in self._wheres:
            self._put(tap, KeptRows(None, None, x_R.clone()))
        return x_R

    @contextmanager
    def passing(self) -> Iterator[Passing]:
        """What passes by in the block is told, and not kept before `keep_passed`."""
        self._passing = passing = Passing()
        try:
            yield passing
        finally:
            self._passing = None

    @torch.inference_mode()
    def keep_passed(self, passing: Passing) -> None:
        """Keeps what the memory of a call holds now."""
        now: dict[BatchRows, BatchRows] = {}
        for tap, x_T, rows, make in passing:
            if rows is None:
                self.show_rows(tap, x_T)
                continue
            if rows not in now:
                now[rows] = rows.as_now(self.names)
            self.keep(tap, x_T, now[rows], make)
