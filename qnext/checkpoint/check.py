"""Does a folder hold exactly the tensors that its configuration describes? Read from headers alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from qnext.checkpoint.collecting import without_collecting
from qnext.checkpoint.formats.forms import Quantization
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import Part, disk_parts, is_leftover, module_of, num_disk_parts
from qnext.checkpoint.packed import PackedWeight, PackedWeights, find_packed, packed_problems
from qnext.checkpoint.quantization import read_quantization
from qnext.checkpoint.sizes import sizes_of
from qnext.config import ModelConfig, from_hf, is_wrapped, load_config_json, says_tied
from qnext.errors import ConfigError, warn
from qnext.planning import parameter_shapes

FLOAT_DTYPES = ("BF16", "F16", "F32")
# Parts of wrappers that a config.json of the language model alone may leave out.
_OTHER_MODALITIES = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.", "model.audio_tower.")
_TRUNK = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.", "mtp.")
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
        self.passed_over: frozenset[str] = frozenset()  # names on disk that nothing reads

    def missing(self, tensors: Mapping[str, TensorInfo]) -> list[str]:
        """Names of weights that lie there neither plain nor packed."""
        disputed = self.packing.disputed
        return [
            name for name in self.targets if name not in tensors and name not in self.packed and name not in disputed
        ]

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


@without_collecting
def read_layout(folder: Path, tensors: dict[str, TensorInfo]) -> Layout:
    """What a folder should hold by its configuration; where that is silent, the tensors that are there decide.

    A warning tells what is passed over: multi-token prediction that is announced and not whole, or there and not
    announced, and tensors outside the language model. Raises ConfigError for a config.json that contradicts itself,
    NotSupported for one that asks for what is not implemented, its quantization_config included.
    """
    path = folder / "config.json"
    values = load_config_json(path)
    has_mtp = any(name.startswith("mtp.") for name in tensors)
    found = sizes_of(tensors, is_tied=says_tied(values))
    config = from_hf(values, file=str(path), has_mtp=has_mtp, tensors_say=found)
    quantization = read_quantization(folder)
    layout = _layout(config, quantization, tensors, path)
    missing = layout.missing(tensors)
    is_without_drafts = bool(missing) and all(name.startswith("mtp.") for name in missing)
    if is_without_drafts:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        asked = "asked for by config.json" if not has_mtp else "not whole"
        warn(f"{folder}: multi-token prediction is {asked}: tensor {missing[0]}{more} missing; the model runs without")
        layout = _layout(config.with_(num_nextn_predict_layers=0), quantization, tensors, path)
    passed_over = set(_passed_over(layout, tensors, is_wrapped=is_wrapped(values)))
    layout.passed_over = layout.packing.passed_over | passed_over
    drafters = sum(name.startswith("mtp.") for name in passed_over)
    if drafters and not is_without_drafts:
        count = f"{drafters} tensors (mtp.*) are" if drafters > 1 else "1 tensor (mtp.*) is"
        warn(f"{folder}: multi-token prediction: {count} not used")
    others = sorted(name for name in passed_over if not name.startswith("mtp.") and not is_leftover(name))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warn(f"{folder}: outside the language model, passed over: tensor {others[0]}{more}")
    return layout


def _layout(
    config: ModelConfig, quantization: Quantization | None, tensors: dict[str, TensorInfo], path: Path
) -> Layout:
    shapes = parameter_shapes(config)
    wanted = sum(num_disk_parts(name, shape) for name, shape in shapes.items())
    if wanted > _MANY + 4 * len(tensors):
        raise ConfigError(
            f"{path}: num_experts: {config.num_experts} asks for {wanted} tensors, the folder holds {len(tensors)}"
        )
    targets = {part.name: Target(name, part) for name, shape in shapes.items() for part in disk_parts(name, shape)}
    packed = find_packed(quantization, {name: target.part.shape for name, target in targets.items()}, tensors)
    return Layout(config, quantization, targets, packed)


def _passed_over(layout: Layout, tensors: Mapping[str, TensorInfo], *, is_wrapped: bool) -> Iterator[str]:
    """Tensors that no part of the model reads, and that cannot change what it computes."""
    read = {module_of(name) for name in layout.targets}
    for name in tensors:
        if name in layout.targets or name in layout.roles or name in layout.packing.passed_over:
            continue
        is_mtp = name.startswith("mtp.") and module_of(name) not in read
        is_elsewhere = not name.startswith(_TRUNK if is_wrapped else ("model.", "lm_head.", "mtp."))
        is_elsewhere |= name.startswith(_OTHER_MODALITIES)
        if is_mtp or is_leftover(name) or (is_elsewhere and not name.startswith("mtp.")):
            yield name


def structure_problems(layout: Layout, tensors: dict[str, TensorInfo], folder: Path) -> Iterator[str]:
    """One line for each tensor that is missing, misshaped, of a wrong dtype, or surplus."""
    yield from layout.packing.problems
    disputed = layout.packing.disputed
    yield from (f"{folder}: tensor {name} is missing" for name in layout.missing(tensors))
    known = set(layout.targets) | set(layout.roles)
    for name, target in layout.targets.items():
        if name in layout.packed:
            yield from packed_problems(layout.packed[name], tensors)
        elif name in tensors and name not in disputed:
            yield from _tensor_problems(tensors[name], target.part.shape)
    if layout.config.tie_word_embeddings:
        # A tied head that was written all the same: read_layout has compared it with the embedding.
        known.add("lm_head.weight")
        if "lm_head.weight" in tensors:
            yield from _tensor_problems(
                tensors["lm_head.weight"], layout.targets["model.embed_tokens.weight"].part.shape
            )
    for name, info in tensors.items():
        if name not in known and name not in layout.passed_over:
            module = name.rpartition(".")[0]
            if f"{module}.weight" not in disputed:
                yield f"{info.file}: tensor {name} is surplus: config.json describes no such tensor"


def _tensor_problems(info: TensorInfo, shape: tuple[int, ...]) -> Iterator[str]:
    if info.shape != shape:
        yield f"{info.file}: tensor {info.name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
    if info.dtype not in FLOAT_DTYPES:
        yield f"{info.file}: tensor {info.name} has dtype {info.dtype}, which is no weight"
