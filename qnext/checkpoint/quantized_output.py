"""A quantised model that is being written: what becomes of each weight, and what that cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint.described import describe
from qnext.checkpoint.files import MAX_SHARD_BYTES, Progress
from qnext.checkpoint.names import Part, disk_parts
from qnext.checkpoint.record_output import WeightForm, record_writer
from qnext.checkpoint.record_values import code_form
from qnext.checkpoint.side_by_side import side_by_side
from qnext.checkpoint.sink import ShardSink, WeightSink
from qnext.checkpoint.weight_source import Group, WeightSource
from qnext.errors import UsageError
from qnext.ops import QuantizedWeight
from qnext.planning import Kind, list_parameters
from qnext.planning.expert_records import MatrixForm
from qnext.quant.layer import Rounded
from qnext.quant.report import TensorError, measure_error
from qnext.quant.rounding import round_nearest
from qnext.quant.scheme import QuantPolicy, QuantScheme

_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Made(NamedTuple):
    """What became of one part of a parameter; `error` None where it is kept."""

    part: Part
    weight: Tensor | QuantizedWeight
    error: TensorError | None


class QuantizedOutput:
    """Gives a sink the weights of a source, each kept or rounded as `policy` says; all are kept where it is None.

    Experts become records `with_records`. Raises UsageError, naming the source, where none would be rounded, and where
    the experts make no records.
    """

    def __init__(
        self,
        source: WeightSource,
        policy: QuantPolicy | None,
        progress: Progress | None,
        *,
        name: object,
        with_records: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.config = source.config
        self.infos = list_parameters(source.config)
        self.errors: list[TensorError] = []
        self._source = source
        self._policy = policy
        self._progress = progress
        self._done = 0
        self.scale_dtype = source.kept_dtype("model.embed_tokens.weight")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise UsageError(f"{name}: weights in {self.scale_dtype} cannot be quantised")
        schemes = {key: self.scheme_of(key) for key in self.infos}
        if policy is not None and not any(schemes.values()):
            raise UsageError(f"{name}: no matrix has inputs in whole groups of {policy.scheme.group_size}")
        self.forms = {
            part.name: WeightForm(info, part, self._form_of(part, schemes[key]))
            for key, info in self.infos.items()
            for part in disk_parts(info)
        }
        self._records = record_writer(self.config, self.forms.values(), name=name) if with_records else None
        self.sink: WeightSink = ShardSink(self.forms, records=self._records, max_shard_bytes=max_shard_bytes)

    def _form_of(self, part: Part, scheme: QuantScheme | None) -> MatrixForm:
        if scheme is None:
            return self._source.kept_form(part.name)
        return code_form(bits=scheme.bits, group_size=scheme.group_size, scale_dtype=self.scale_dtype, has_zeros=False)

    def scheme_of(self, parameter: str) -> QuantScheme | None:
        return None if self._policy is None else self._policy.scheme_of(self.infos[parameter])

    def write_all(self, groups: Iterable[Group] | None = None) -> None:
        """The weights of `groups`, or every one, rounded to nearest where the policy quantises them.

        Several are read and rounded at once.
        """
        with closing(
            side_by_side(self._make, self._expected(self._source.groups() if groups is None else groups))
        ) as made:
            for parts in made:
                for each in parts:
                    self._add(each)

    def _expected(self, groups: Iterable[Group]) -> Iterator[tuple[Group, int]]:
        for group in groups:
            self._source.expect(group)
            yield group, sum(self._source.size_of(part.name) for part in group.parts)

    def _make(self, group: Group) -> list[Made]:
        """Read and round; in any thread."""
        made = []
        for part, original in zip(group.parts, self._source.read(group), strict=True):
            scheme = self.scheme_of(group.parameter.name)
            if scheme is None:
                made.append(Made(part, original, None))
                continue
            assert isinstance(original, Tensor)
            weight = round_nearest(original, scheme, scale_dtype=self.scale_dtype)
            rounded = Rounded(group.parameter.name, None, original, weight, None)
            made.append(Made(part, weight, measure_error(part.name, rounded, slice(None))))
        return made

    def _add(self, made: Made) -> None:
        self.sink.add(made.part, made.weight)
        if made.error is not None:
            self.errors.append(made.error)
        self.pass_over([made.part])

    def pass_over(self, parts: Iterable[Part]) -> None:
        """Nothing is left to do of these."""
        self._done += sum(self._source.size_of(part.name) for part in parts)
        if self._progress is not None:
            self._progress(self._done, self._source.num_bytes)

    def keep(self, name: str) -> None:
        """Write a parameter unchanged."""
        for part in disk_parts(self.infos[name]):
            (values,) = self._source.read(Group(self.infos[name], [part]))
            self._add(Made(part, values, None))

    def write(self, name: str, rounded: Rounded) -> None:
        """Write the result for the parameter `name`, or for one expert of it."""
        for part in disk_parts(self.infos[name]):
            if part.expert == rounded.expert:
                rows = slice(None) if part.rows is None else slice(*part.rows)
                weight = rounded.weight
                weight = QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.bits, weight.group_size)
                self._add(Made(part, weight, measure_error(part.name, rounded, rows)))

    def names_in(self, layer: int) -> Iterator[str]:
        """The parameters of a layer of the trunk. The layer after the last one is the MTP module."""
        return (name for name, info in self.infos.items() if info.layer == layer)

    def describe(self) -> dict[str, Any] | None:
        """The quantization_config of the folder, or None."""
        return describe(self.forms.values(), config=self.config, records=self._records)

    @property
    def head(self) -> QuantScheme | None:
        """The scheme of the head, or None where it is kept."""
        return next((self.scheme_of(name) for name, info in self.infos.items() if info.kind is Kind.HEAD), None)
