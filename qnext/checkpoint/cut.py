"""A layout as one rank sees it: the tensors, or rows of tensors, that it reads. From headers alone. No torch.

Rows of a tensor lie one after another in its file, so they are a tensor of their own with another start and end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Protocol

from qnext.checkpoint.check import Layout
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import Part, Target
from qnext.checkpoint.packed import PackedWeight
from qnext.checkpoint.stored import stored_tensors
from qnext.errors import NotSupported
from qnext.parallel.shard import Span
from qnext.planning import ParameterInfo

_REPEATS_SIZES = "shape"  # the content of a tensor that says how large the whole weight is


class RankRows(Protocol):
    """What a rank has of each parameter; see parallel.shard.RankShard."""

    def experts_of(self, layer: int) -> Sequence[int]: ...

    def spans_of(self, info: ParameterInfo) -> list[Span]: ...

    def info_of(self, info: ParameterInfo) -> ParameterInfo: ...


def cut_layout(layout: Layout, shard: RankRows, *, but: Collection[str] = ()) -> Layout:
    """What `shard` has of a folder whose structure is sound, without the experts of the layers `but`, which lie in
    records. Raises NotSupported for weights in a form whose rows cannot be read apart."""
    layout = layout.with_experts_of(layout.records.keys() - set(but))
    cut = _Cut(layout)
    places = {
        layer: {expert: place for place, expert in enumerate(shard.experts_of(layer))}
        for layer in {info.layer for info, _ in layout.targets.values() if info.expert_axis is not None}
        if layer is not None
    }
    for name, (info, part) in layout.targets.items():
        own = shard.info_of(info)
        if part.expert is not None:
            assert info.layer is not None
            place = places[info.layer].get(part.expert)
            if place is not None:
                cut.keep(name, Target(own, part._replace(expert=place)))
            continue
        spans = shard.spans_of(info)
        if spans == [(0, info.shape[0])]:
            cut.keep(name, Target(own, part))
            continue
        row = 0  # a parameter of which this rank has nothing has no spans
        for start, end in spans:
            rows = (row, row := row + end - start)
            cut.cut(name, Target(own, part), (start, end), rows if spans[1:] else None)
    return cut.layout()


class _Cut:
    """Collects what a rank reads."""

    def __init__(self, layout: Layout) -> None:
        self._whole = layout
        self._tensors: dict[str, TensorInfo] = {}
        self._targets: dict[str, Target] = {}
        self._packed: dict[str, PackedWeight] = {}

    def keep(self, name: str, target: Target) -> None:
        """A tensor as it is."""
        self._targets[name] = target
        if name in self._whole.packed:
            self._packed[name] = self._whole.packed[name]
        self._tensors |= {stored: self._whole.index.tensors[stored] for stored in self._whole.stored_names(name)}

    def cut(self, name: str, target: Target, span: Span, rows: Span | None) -> None:
        """Rows `span` of a tensor, which become all of the parameter or `rows` of it."""
        info, part = target
        num_rows = part.shape[0]
        shape = (span[1] - span[0], *part.shape[1:])
        packed = self._whole.packed.get(name)
        if packed is None:
            # A name of its own for each part of a parameter that is cut in several.
            own = name if rows is None else f"{name}[{span[0]}:{span[1]}]"
            self._tensors[own] = _rows_of(self._whole.index.tensors[name], span, num_rows, own)
            self._targets[own] = Target(info, Part(own, shape, rows=rows))
            return
        assert rows is None, name
        stored = [each for kind, each in packed.stored.items() if kind != _REPEATS_SIZES]
        if packed.form.layout in ("awq", "gptq", "gptq_v2") or packed.form.layout.startswith("bnb-"):
            first = self._whole.index.tensors[stored[0].name]
            raise NotSupported(
                f"{first.file}: tensor {first.name}: ranks read rows apart, which {packed.form.describe()} "
                "does not allow; `qnext quantize` writes a folder that does"
            )
        tensors = {
            each.name: _rows_of(self._whole.index.tensors[each.name], span, num_rows, each.name) for each in stored
        }
        self._tensors |= tensors
        self._targets[name] = Target(info, Part(name, shape))
        found = stored_tensors(name, (shape[0], shape[1]), packed.form, tensors)
        found.pop(_REPEATS_SIZES, None)
        self._packed[name] = PackedWeight((shape[0], shape[1]), packed.form, found)

    def layout(self) -> Layout:
        whole = self._whole
        tensors = dict(sorted(self._tensors.items(), key=lambda item: (str(item[1].file), item[1].start)))
        view = whole.view._replace(checkpoint=whole.view.checkpoint._replace(tensors=tensors))
        packing = whole.packing._replace(weights=self._packed)
        return Layout(view, whole.config, whole.quantization, self._targets, packing)


def _rows_of(info: TensorInfo, span: Span, num_rows: int, name: str) -> TensorInfo:
    """The part of a tensor that belongs to rows `span` of `num_rows` outputs. A scale may be for several."""
    if prod(info.shape) == 1 and num_rows > 1:
        return info
    per, rest = divmod(num_rows, info.shape[0])
    if rest or span[0] % per or span[1] % per:
        raise NotSupported(
            f"{info.file}: tensor {info.name}: one number belongs to several rows, and ranks would cut between rows "
            f"{span[0]} and {span[1]} of {num_rows}"
        )
    start, end = span[0] // per, span[1] // per
    row_bytes = info.num_bytes // info.shape[0]
    return info._replace(
        name=name,
        shape=(end - start, *info.shape[1:]),
        start=info.start + start * row_bytes,
        end=info.start + end * row_bytes,
    )
