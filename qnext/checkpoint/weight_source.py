"""Where the weights of a model come from that is being written: a folder, or a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qnext.checkpoint.check import Layout
from qnext.checkpoint.codes import coded_parameters
from qnext.checkpoint.files import TORCH_DTYPES, TensorFiles
from qnext.checkpoint.names import Part, disk_parts, parts_by_expert
from qnext.checkpoint.record_values import code_form, matrix_form
from qnext.checkpoint.values import read_sound_codes, read_sound_weight
from qnext.config import ModelConfig
from qnext.model.init import initial_values
from qnext.ops import QuantizedWeight
from qnext.planning import ParameterInfo, list_parameters
from qnext.planning.expert_records import MatrixForm


class Group(NamedTuple):
    """Parts of one parameter that are read at once."""

    parameter: ParameterInfo
    parts: list[Part]


class WeightSource(Protocol):
    """Numbers for the parts that a model has on disk. Any thread may ask."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def num_bytes(self) -> int:
        """Of everything there."""
        ...

    def kept_dtype(self, name: str) -> torch.dtype:
        """In which the numbers of a weight are read."""
        ...

    def kept_form(self, name: str) -> MatrixForm:
        """In which a weight is read, and written where it is not quantised."""
        ...

    def size_of(self, name: str) -> int:
        """Bytes of a weight there."""
        ...

    def groups(self) -> Iterator[Group]:
        """Everything, in the order of the model."""
        ...

    def expect(self, group: Group) -> None:
        """The group is wanted soon."""
        ...

    def read(self, group: Group) -> Sequence[Tensor | QuantizedWeight]:
        """Each part in its kept form. Raises CorruptCheckpoint for numbers that are not sound."""
        ...


class FolderWeights:
    """The weights of a folder, however they lie there; packed floats become numbers in bf16.

    With `keeps_codes` those that a model would hold as codes stay so.
    """

    def __init__(self, files: TensorFiles, layout: Layout, *, keeps_codes: bool = False) -> None:
        self.config = layout.config
        self.num_bytes = sum(info.num_bytes for info in files.tensors.values())
        self._files = files
        self._layout = layout
        self._parameters = list_parameters(layout.config)
        self._codes = coded_parameters(layout, files) if keeps_codes else {}

    def kept_dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._layout.packed else TORCH_DTYPES[self._files.tensors[name].dtype]

    def kept_form(self, name: str) -> MatrixForm:
        codes = self._codes.get(self._layout.targets[name].parameter.name)
        if codes is None:
            return matrix_form(self.kept_dtype(name))
        return code_form(
            bits=codes.bits, group_size=codes.group_size, scale_dtype=codes.scale_dtype, has_zeros=codes.has_zeros
        )

    def size_of(self, name: str) -> int:
        return sum(self._files.tensors[stored].num_bytes for stored in self._layout.stored_names(name))

    def groups(self) -> Iterator[Group]:
        return (Group(info, [part]) for info, part in parts_by_expert(self._parameters.values()))

    def expect(self, group: Group) -> None:
        for part in group.parts:
            for stored in self._layout.stored_names(part.name):
                self._files.expect(stored)

    def read(self, group: Group) -> Sequence[Tensor | QuantizedWeight]:
        if group.parameter.name in self._codes:
            return [read_sound_codes(self._layout, self._files, part.name) for part in group.parts]
        return [self.read_part(part.name, self.kept_dtype(part.name)) for part in group.parts]

    def read_part(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in `dtype`, checked."""
        return read_sound_weight(self._layout, self._files, name, dtype=dtype)

    def read_parameter(self, name: str) -> Tensor:
        """A parameter of the model in fp32, experts stacked."""
        info = self._parameters[name]
        values = torch.empty(info.shape)
        for part in disk_parts(info):
            values[part.place] = self.read_part(part.name, torch.float32)
        return values

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module that was made on the meta device its parameters, in fp32."""
        for path, owner in module.named_modules():
            for key in list(owner._parameters):
                if owner._parameters[key] is not None:
                    name = ".".join(piece for piece in (prefix.rstrip("."), path, key) if piece)
                    owner._parameters[key] = nn.Parameter(self.read_parameter(name), requires_grad=False)


class RandomWeights:
    """What `initialize(CausalLM(config), seed=seed)` gives, rounded to `dtype`."""

    def __init__(self, config: ModelConfig, *, seed: int, dtype: torch.dtype) -> None:
        self.config = config
        self._seed = seed
        self._dtype = dtype
        parts = (part for group in self.groups() for part in group.parts)
        self._sizes = {part.name: prod(part.shape) * dtype.itemsize for part in parts}
        self.num_bytes = sum(self._sizes.values())

    def kept_dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def kept_form(self, name: str) -> MatrixForm:
        return matrix_form(self._dtype)

    def size_of(self, name: str) -> int:
        return self._sizes[name]

    def groups(self) -> Iterator[Group]:
        """An expert's gate and up are drawn as one block."""
        parts = parts_by_expert(list_parameters(self.config).values())
        for _, group in groupby(parts, key=lambda pair: (pair[0].name, pair[1].expert)):
            (info, first), *others = group
            yield Group(info, [first, *(part for _, part in others)])

    def expect(self, group: Group) -> None:
        pass

    def read(self, group: Group) -> Sequence[Tensor | QuantizedWeight]:
        expert = group.parts[0].expert
        values = initial_values(self.config, group.parameter, seed=self._seed, expert=expert, dtype=self._dtype)
        return [values if part.rows is None else values[slice(*part.rows)] for part in group.parts]
