"""Where the weights of a quantised model go."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qnext.checkpoint.files import ShardWriter, TensorSpec
from qnext.checkpoint.names import Part
from qnext.checkpoint.record_output import RecordWriter, WeightForm
from qnext.checkpoint.record_values import DTYPES
from qnext.checkpoint.write_behind import WriteBehind
from qnext.ops import QuantizedWeight
from qnext.quant.formats import compressed_tensors_of, compressed_tensors_specs


class WeightSink(Protocol):
    """A form of a model on disk, told beforehand what it will hold: begin, add each weight once, finish; then close.

    `num_bytes` is what the form takes on the disk.
    """

    num_bytes: int

    def size_of(self, name: str) -> int:
        """Of the weight `name` alone."""
        ...

    def begin(self, folder: Path, *, written: Collection[str] = ()) -> None:
        """Write into a folder that is being made. The weights `written` lie there, from an earlier run."""
        ...

    def add(self, part: Part, weight: Tensor | QuantizedWeight) -> None:
        """Weights come in any order, and must not change any more. What went wrong may be raised by a later call."""
        ...

    def sync(self) -> None:
        """What was added is on the disk when it returns."""
        ...

    def finish(self) -> None:
        """All weights were added; they are on the disk when it returns."""
        ...

    def close(self) -> None:
        """Nothing is written any more when it returns. In any state, and more than once."""
        ...


class ShardSink:
    """Safetensors shards; quantised weights as compressed-tensors' pack-quantized, experts in the last shards where
    `records` takes them. A thread of its own writes."""

    def __init__(
        self, forms: Mapping[str, WeightForm], *, records: RecordWriter | None = None, max_shard_bytes: int
    ) -> None:
        self._max_shard_bytes = max_shard_bytes
        self._writer: WriteBehind | None = None
        self._records = records
        self._plan: dict[str, TensorSpec] = {}
        self._keys: dict[str, list[str]] = {}  # of a weight that is no record
        for name, (_, part, form) in forms.items():
            if records is not None and records.takes(part):
                continue
            if form.is_float:
                self._plan[name] = TensorSpec(DTYPES[form.dtype], part.shape)
                self._keys[name] = [name]
                continue
            num_outputs, num_inputs = part.shape
            specs = compressed_tensors_specs(
                part.module,
                (num_outputs, num_inputs),
                bits=form.bits,
                group_size=form.group_size,
                scale_dtype=DTYPES[form.scale_dtype],
                has_zeros=form.has_zeros,
            )
            self._plan.update({key: TensorSpec(*spec) for key, spec in specs.items()})
            self._keys[name] = list(specs)
        if records is not None:
            self._plan.update(records.specs())
        self.num_bytes = sum(spec.num_bytes for spec in self._plan.values())

    def size_of(self, name: str) -> int:
        return sum(self._plan[key].num_bytes for key in self._keys[name])

    def begin(self, folder: Path, *, written: Collection[str] = ()) -> None:
        keys = {key for name in written for key in self._keys[name]}
        writer = ShardWriter(folder, self._plan, max_shard_bytes=self._max_shard_bytes, written=keys)
        self._writer = WriteBehind(writer)

    def add(self, part: Part, weight: Tensor | QuantizedWeight) -> None:
        assert self._writer is not None
        if self._records is not None and self._records.takes(part):
            self._records.add(self._writer, part, weight)
            return
        if isinstance(weight, Tensor):
            self._writer.write(part.name, weight)
            return
        for key, tensor in compressed_tensors_of(part.module, weight).items():
            self._writer.write(key, tensor)

    def sync(self) -> None:
        assert self._writer is not None
        self._writer.sync()

    def finish(self) -> None:
        assert self._writer is not None
        self._writer.finish()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
