"""Does a folder hold exactly the tensors that its configuration describes? Read from headers alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from qnext.checkpoint.formats.forms import Quantization
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import Part, disk_parts, is_leftover, num_disk_parts
from qnext.checkpoint.packed import PackedWeight, PackedWeights, find_packed, packed_problems
from qnext.checkpoint.quantization import read_quantization
from qnext.config import ModelConfig, read_config
from qnext.errors import ConfigError
from qnext.planning import parameter_shapes

FLOAT_DTYPES = ("BF16", "F16", "F32")
# A folder that lacks more tensors than this has another configuration; their names are not even listed.
_MANY = 1_000_000


class Target(NamedTuple):
    """Where a tensor of the disk goes: a parameter of the module, and which part of it."""

    parameter: str
    part: Part


class Role(NamedTuple):
    """What a tensor is to a packed weight: its codes, scales, zeros, shape or index."""

    weight: str
    kind: str


class Layout:
    """What a folder should hold."""

    def __init__(
        self,
        config: ModelConfig,
        quantization: Quantization | None,
        targets: dict[str, Target],
        packed: PackedWeights,
    ) -> None:
        self.config = config
        self.quantization = quantization
        self.targets = targets  # by name on disk, of the weight also where it lies packed
        self.packed: dict[str, PackedWeight] = packed.weights  # likewise
        self.packing = packed

    def stored_names(self, name: str) -> list[str]:
        """The tensors on disk that a weight consists of: itself, or those that it lies packed in."""
        packed = self.packed.get(name)
        return [name] if packed is None else [stored.name for stored in packed.stored.values()]

    @cached_property
    def roles(self) -> dict[str, Role]:
        """By name on disk: the tensors that packed weights consist of."""
        return {
            stored.name: Role(name, kind)
            for name, packed in self.packed.items()
            for kind, stored in packed.stored.items()
        }


def read_layout(folder: Path, tensors: dict[str, TensorInfo]) -> Layout:
    """Configuration of a folder; where it is silent about MTP, the tensors that are there decide.

    Raises ConfigError for a config.json that is not understood, its quantization_config included.
    """
    config = read_config(folder, has_mtp=any(name.startswith("mtp.") for name in tensors))
    shapes = parameter_shapes(config)
    wanted = sum(num_disk_parts(name, shape) for name, shape in shapes.items())
    if wanted > _MANY + 4 * len(tensors):
        raise ConfigError(
            f"{folder / 'config.json'}: num_experts: {config.num_experts} asks for {wanted} tensors, "
            f"the folder holds {len(tensors)}"
        )
    targets = {part.name: Target(name, part) for name, shape in shapes.items() for part in disk_parts(name, shape)}
    quantization = read_quantization(folder)
    packed = find_packed(quantization, {name: target.part.shape for name, target in targets.items()}, tensors)
    return Layout(config, quantization, targets, packed)


def structure_problems(layout: Layout, tensors: dict[str, TensorInfo], folder: Path) -> Iterator[str]:
    """One line for each tensor that is missing, misshaped, of a wrong dtype, or surplus."""
    yield from layout.packing.problems
    disputed = layout.packing.disputed
    missing = [
        name for name in layout.targets if name not in tensors and name not in layout.packed and name not in disputed
    ]
    if missing and all(name.startswith("mtp.") for name in missing):
        is_absent = not any(name.startswith("mtp.") for name in tensors)
        yield (
            f"{folder}: config.json asks for multi-token prediction (num_nextn_predict_layers = 1), but tensor "
            f"{missing[0]} is missing{'; set it to 0 to load the model without' if is_absent else ''}"
        )
    else:
        yield from (f"{folder}: tensor {name} is missing" for name in missing)
    known = set(layout.targets) | set(layout.roles) | layout.packing.passed_over
    for name, target in layout.targets.items():
        if name in layout.packed:
            yield from packed_problems(layout.packed[name], tensors)
        elif name in tensors and name not in disputed:
            yield from _tensor_problems(tensors[name], target.part.shape)
    if layout.config.tie_word_embeddings:
        # A tied head that was written all the same is compared with the embedding when values are read.
        known.add("lm_head.weight")
        if "lm_head.weight" in tensors:
            yield from _tensor_problems(
                tensors["lm_head.weight"], layout.targets["model.embed_tokens.weight"].part.shape
            )
    for name, info in tensors.items():
        if name not in known and not is_leftover(name):
            module = name.rpartition(".")[0]
            if f"{module}.weight" not in disputed:
                yield f"{info.file}: tensor {name} is surplus: config.json describes no such tensor"


def _tensor_problems(info: TensorInfo, shape: tuple[int, ...]) -> Iterator[str]:
    if info.shape != shape:
        yield f"{info.file}: tensor {info.name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
    if info.dtype not in FLOAT_DTYPES:
        yield f"{info.file}: tensor {info.name} has dtype {info.dtype}, which is no weight"
