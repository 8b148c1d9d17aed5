"""Whether a folder holds exactly the tensors that its configuration describes. It reads only headers. No torch."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from qnext.checkpoint.formats.forms import Form, Quantization
from qnext.checkpoint.formats.records import panel_form
from qnext.checkpoint.header import CheckpointIndex, TensorInfo, index_of
from qnext.checkpoint.names import Target, disk_parts, is_leftover, module_of, num_disk_parts
from qnext.checkpoint.packed import PackedWeight, PackedWeights, find_packed, packed_problems
from qnext.checkpoint.quantization import read_quantization
from qnext.checkpoint.records import ExpertRecords, RecordView, list_parts, view_records
from qnext.checkpoint.sizes import sizes_of
from qnext.collecting import without_collecting
from qnext.config import ModelConfig, from_hf, is_wrapped, load_config_json, says_tied
from qnext.errors import ConfigError, warn
from qnext.planning import ParameterInfo, list_parameters

FLOAT_DTYPES = ("BF16", "F16", "F32")
# Parts of wrappers that a config.json of the language model alone may leave out.
_OTHER_MODALITIES = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.", "model.audio_tower.")
_TRUNK = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.", "mtp.")
# A folder that lacks more tensors than this has another configuration; their names are not even listed.
_MANY = 1_000_000


class Role(NamedTuple):
    """What a tensor is to a packed weight: its codes, scales, zeros, shape or index."""

    weight: str
    kind: str


class Layout:
    """What a folder should hold according to its configuration. `index` is what it holds.

    A layer of experts in records is one tensor there, and its weights are no targets. `with_experts_of` lists them.
    """

    def __init__(
        self,
        view: RecordView,
        config: ModelConfig,
        quantization: Quantization | None,
        targets: dict[str, Target],
        packed: PackedWeights,
    ) -> None:
        self.index = view.checkpoint
        self.view = view
        self.records: dict[str, ExpertRecords] = view.records  # by name of the layer
        self.config = config
        self.quantization = quantization
        self.targets = targets  # by name on disk, of the weight also where it lies packed
        self.packed: dict[str, PackedWeight] = packed.weights  # likewise
        self.packing = packed
        self.passed_over: frozenset[str] = frozenset()  # names on disk that nothing reads

    @without_collecting
    def with_experts_of(self, layers: Collection[str]) -> Layout:
        """The same with the records of these layers seen as their parts. For the 80B these are 150,000 tensors."""
        layers = set(layers) & self.view.unlisted.keys()
        if not layers:
            return self
        view = list_parts(self.view, layers)
        infos = list_parameters(self.config).values()
        targets = _targets(infos, but=view.unlisted)
        found = find_packed(
            self.quantization,
            {name: each for name, each in targets.items() if name not in self.targets},
            view.checkpoint.tensors,
        )
        packed = PackedWeights(
            {**self.packing.weights, **found.weights},
            [*self.packing.problems, *found.problems],
            self.packing.disputed | found.disputed,
            self.packing.passed_over | found.passed_over,
        )
        listed = Layout(view, self.config, self.quantization, targets, packed)
        listed.passed_over = self.passed_over | packed.passed_over
        return listed

    def with_all_experts(self) -> Layout:
        """The same with all records seen as their parts."""
        return self.with_experts_of(self.view.unlisted)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as stored: of records with what is between their parts."""
        return self.view.num_bytes

    @property
    def packed_forms(self) -> set[Form]:
        """Those of all packed weights, also of experts in records."""
        layouts = {each.layout for each in self.view.unlisted.values()}
        panels = (panel_form(form) for layout in layouts for form in (layout.gate_up, layout.down))
        return {packed.form for packed in self.packed.values()} | {form for form in panels if form is not None}

    def missing(self) -> list[str]:
        """Names of weights that the folder holds neither plain nor packed."""
        disputed, tensors = self.packing.disputed, self.index.tensors
        return [
            name for name in self.targets if name not in tensors and name not in self.packed and name not in disputed
        ]

    def stored_names(self, name: str) -> list[str]:
        """The tensors on disk that make up a weight: the weight itself, or those in which it is packed."""
        packed = self.packed.get(name)
        return [name] if packed is None else [stored.name for stored in packed.stored.values()]

    def part_of(self, name: str) -> str | None:
        """The field of ParameterCounts that a tensor on disk counts for; None where nothing reads the tensor."""
        if name in self.passed_over:
            return None
        if name in self.unlisted_tensors:
            return "mtp" if name.startswith("mtp.") else "experts"
        weight = self.roles[name].weight if name in self.roles else name
        # A tied head that was written all the same is no target.
        return self.targets[weight].parameter.part if weight in self.targets else "head"

    @cached_property
    def unlisted_tensors(self) -> frozenset[str]:
        """Names of the tensors in which experts are records that are not seen as their parts."""
        return frozenset(each.records.name for each in self.view.unlisted.values())

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The tensors that make up packed weights, by their names on disk."""
        return {
            stored.name: Role(name, kind)
            for name, packed in self.packed.items()
            for kind, stored in packed.stored.items()
        }


@without_collecting
def read_layout(source: str | Path | CheckpointIndex) -> Layout:
    """Headers and configuration of a folder, or the configuration for an index that was read.

    Where the configuration says nothing, the tensors decide. A warning names what is ignored: multi-token prediction
    that is declared and incomplete, or present and not declared, and tensors outside the language model. Raises the
    errors of read_index, ConfigError for a config.json that contradicts itself, and NotSupported for one that asks for
    something that is not implemented, also in its quantization_config.
    """
    index = index_of(source)
    folder, tensors = index.folder, index.tensors
    path = folder / "config.json"
    values = load_config_json(path)
    has_mtp = any(name.startswith("mtp.") for name in tensors)
    found = sizes_of(tensors, is_tied=says_tied(values))
    config = from_hf(values, file=str(path), has_mtp=has_mtp, tensors_say=found)
    quantization = read_quantization(folder)
    layout = _layout(index, config, quantization)
    missing = layout.missing()
    is_without_drafts = bool(missing) and all(name.startswith("mtp.") for name in missing)
    if is_without_drafts:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        asked = "asked for by config.json" if not has_mtp else "incomplete"
        warn(
            f"{folder}: multi-token prediction is {asked}: tensor {missing[0]}{more} missing; the model runs without it"
        )
        layout = _layout(index, config.with_(num_nextn_predict_layers=0), quantization)
    passed_over = set(_passed_over(layout, is_wrapped=is_wrapped(values)))
    layout.passed_over = layout.packing.passed_over | passed_over
    drafters = sum(name.startswith("mtp.") for name in passed_over)
    if drafters and not is_without_drafts:
        count = f"{drafters} tensors (mtp.*) are" if drafters > 1 else "1 tensor (mtp.*) is"
        warn(f"{folder}: multi-token prediction: {count} not used")
    others = sorted(name for name in passed_over if not name.startswith("mtp.") and not is_leftover(name))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warn(f"{folder}: outside the language model, ignored: tensor {others[0]}{more}")
    unaligned = [each.records for each in layout.records.values() if not each.is_aligned]
    if unaligned:
        warn(
            f"{unaligned[0].file}: tensor {unaligned[0].name} begins within a page: it is read, but cannot be streamed"
        )
    return layout


def layout_of(source: str | Path | Layout) -> Layout:
    """The layout of a folder that may have been read already, so that no command reads its headers twice."""
    return source if isinstance(source, Layout) else read_layout(source)


def _targets(infos: Iterable[ParameterInfo], *, but: Container[str]) -> dict[str, Target]:
    """By name on disk, without the experts of the layers `but`."""
    return {
        part.name: Target(info, part)
        for info in infos
        if info.expert_axis is None or info.name.partition(".mlp.")[0] not in but
        for part in disk_parts(info)
    }


def _layout(index: CheckpointIndex, config: ModelConfig, quantization: Quantization | None) -> Layout:
    infos = list_parameters(config).values()
    wanted = sum(map(num_disk_parts, infos))
    if wanted > _MANY + 4 * len(index.tensors):
        raise ConfigError(
            f"{index.folder / 'config.json'}: num_experts: {config.num_experts} asks for {wanted} tensors, the folder "
            f"holds {len(index.tensors)}"
        )
    view = view_records(index, config, {} if quantization is None else quantization.records)
    targets = _targets(infos, but=view.unlisted)
    packed = find_packed(quantization, targets, view.checkpoint.tensors)
    if view.problems:
        disputed = {name for name in targets if name.partition(".mlp.")[0] in view.disputed and ".experts." in name}
        packed = packed._replace(
            problems=[*view.problems, *packed.problems], disputed=packed.disputed | frozenset(disputed)
        )
    return Layout(view, config, quantization, targets, packed)


def _passed_over(layout: Layout, *, is_wrapped: bool) -> Iterator[str]:
    """Tensors that no part of the model reads, and that cannot change what it computes."""
    read = {module_of(name) for name in layout.targets}
    known = layout.targets.keys() | layout.roles.keys() | layout.packing.passed_over | layout.unlisted_tensors
    for name in layout.index.tensors:
        if name in known:
            continue
        is_beside_records = name.partition(".mlp.experts.")[0] in layout.records
        is_mtp = name.startswith("mtp.") and module_of(name) not in read and not is_beside_records
        is_elsewhere = not name.startswith(_TRUNK if is_wrapped else ("model.", "lm_head.", "mtp."))
        is_elsewhere |= name.startswith(_OTHER_MODALITIES)
        if is_mtp or is_leftover(name) or (is_elsewhere and not name.startswith("mtp.")):
            yield name


def structure_problems(layout: Layout) -> Iterator[str]:
    """One line for each tensor that is missing, surplus, or of a wrong shape or dtype."""
    yield from layout.packing.problems
    disputed, tensors = layout.packing.disputed, layout.index.tensors
    yield from (f"{layout.index.folder}: tensor {name} is missing" for name in layout.missing())
    known = layout.targets.keys() | layout.roles.keys() | layout.unlisted_tensors
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
