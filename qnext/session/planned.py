"""What a model would take and give here: its sizes from headers or a preset, and rates that are measured for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qnext.errors import UsageError
from qnext.parallel.mesh import Mesh
from qnext.planning import ParameterInfo, list_parameters, machine
from qnext.planning.anatomy import part_bytes
from qnext.planning.calibration import Calibration, calibration_file, read_calibration
from qnext.planning.cost import Prices
from qnext.planning.expert_memory import ExpertSizes
from qnext.planning.expert_records import MatrixForm, RecordFile, RecordLayout
from qnext.planning.expert_speed import MachineRates
from qnext.planning.forecast import Circumstances
from qnext.planning.machines import PlannedMachine
from qnext.planning.measured import MeasuredFigure, measured_file, read_measured
from qnext.planning.parameters import QUANTIZED
from qnext.planning.speculation import ASSUMED_ACCEPTANCE
from qnext.planning.step_load import Peaks, StoredSizes

if TYPE_CHECKING:
    from qnext.checkpoint.check import Layout
    from qnext.config import ModelConfig
    from qnext.ops.expert_rates import KernelRates

ASSUMED_DISK = 1_500_000_000  # bytes a second, where there is nothing to be read
ASSUMED_SCHEME, FLOAT_SCHEME, FP8_SCHEME = "int4-g32", "bf16", "fp8"
_FP8_BLOCK = 128 * 128  # weights that share a scale of four bytes, as in the released checkpoints
ASSUMED_CONTEXT = 4096
_PROBED_BYTES = 48 << 20
_WIDTH, _USED = 512, 8  # of a model without experts, as if it had some


@dataclass(frozen=True)
class PlannedModel:
    """A folder, or a preset in a scheme. `files` are the records that can be read here; a preset has none. `assumed`
    says what was chosen where nothing was given. `part_bytes` has the fields of ParameterCounts,
    `precision` is that of most numbers that are multiplied: bf16, fp32, fp8, int8 or int4."""

    name: str
    config: ModelConfig
    sizes: StoredSizes
    part_bytes: Mapping[str, int]
    precision: str
    is_quantized: bool
    files: list[RecordFile]
    assumed: tuple[str, ...] = ()


class Asked(NamedTuple):
    """What a plan is asked for: `batch` sequences of `context` tokens, here or on an `other` machine, by the ranks of
    `mesh`. What is not given is measured or assumed."""

    context: int | None = None
    batch: int = 1
    free_bytes: int | None = None
    disk_rate: float | None = None
    expert_bytes: int | None = None
    other: PlannedMachine | None = None
    acceptance: float = ASSUMED_ACCEPTANCE
    calibration: Path | None = None
    prices: Prices = Prices()
    mesh: Mesh = Mesh()


def planned_model(model: str, scheme: str | None = None, *, yarn: float | None = None) -> PlannedModel:
    """A preset, a folder or a hub name, as it lies there or as it would in `scheme` with experts in records; its
    context stretched by YaRN where a factor is given.

    Raises ModelNotFound, CorruptCheckpoint, UsageError for a scheme that there is not.
    """
    if yarn is not None:
        found = planned_model(model, scheme)
        return replace(found, config=found.config.with_yarn(yarn), assumed=(*found.assumed, f"--yarn {yarn:g}"))
    from qnext.config import PRESETS, preset

    if model in PRESETS and not Path(model).is_dir():
        found = _in_scheme(model, preset(model), scheme or ASSUMED_SCHEME)
        return found if scheme else PlannedModel(**{**vars(found), "assumed": (f"--scheme {ASSUMED_SCHEME}",)})
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.resolve import resolve_model

    layout = read_layout(resolve_model(model))
    return planned_folder(model, layout) if scheme is None else _in_scheme(model, layout.config, scheme)


def planned_folder(name: str, layout: Layout) -> PlannedModel:
    """A folder as it is."""
    from qnext.checkpoint.streamed import expert_sizes, readable_records

    by_part: Counter[str] = Counter()
    for info in layout.index.tensors.values():
        by_part[layout.part_of(info.name) or "not used"] += info.num_bytes
    files = readable_records(layout)
    experts = expert_sizes(layout, files) if files else _expert_sizes(layout.config, by_part, None)
    sizes = StoredSizes(_dense_bytes(layout.config, by_part), experts, can_stream=bool(files))
    is_packed = bool(layout.packed_forms)
    return PlannedModel(name, layout.config, sizes, by_part, _precision_of(layout), is_packed, files)


def _precision_of(layout: Layout) -> str:
    """By the names of packed forms, or the dtype of most numbers."""
    numbers: Counter[str] = Counter()
    for weight in layout.packed.values():
        told = weight.form.describe()
        numbers[next((name for name in ("int4", "int8", "fp8") if name in told), "int4")] += prod(weight.shape)
    if not numbers:
        for info in layout.index.tensors.values():
            numbers["fp32" if info.dtype == "F32" else "fp8" if info.dtype.startswith("F8") else "bf16"] += prod(
                info.shape
            )
    return numbers.most_common(1)[0][0]


def circumstances(planned: PlannedModel, asked: Asked) -> Circumstances:
    """What is free here, or what is asked for; and rates, which are measured in a second or two, unless they are those
    of another machine. A disk is only measured where there are records to read. Raises UsageError for a `context` that
    the model does not have."""
    import torch

    from qnext.residency.probe import probe

    most, other = planned.config.context_length, asked.other
    if asked.context is not None and not 1 <= asked.context <= most:
        raise UsageError(f"{planned.name}: --context {asked.context} is beyond the model's context of {most}")
    length = min(ASSUMED_CONTEXT, most) if asked.context is None else asked.context
    on = Circumstances(0, torch.get_num_threads(), MachineRates(0, 0, 0), length, asked.batch, asked.expert_bytes)
    if other is not None:
        return _elsewhere(planned, asked, other, on)
    free = machine.available_bytes()
    disk = asked.disk_rate
    if disk is None:
        files = planned.files
        disk = probe(files, num_bytes=_PROBED_BYTES).bytes_per_second if files else ASSUMED_DISK
    kernels = kernel_rates(planned.config, is_quantized=planned.is_quantized)
    rates = MachineRates(kernels.memory, disk, kernels.arithmetic)
    on = on._replace(free_bytes=asked.free_bytes or free, rates=rates)
    found = calibration_of(asked)
    if found is None:
        return on
    return on._replace(
        speed=found.speeds.get(planned.precision), peaks=found.peaks(planned.precision), cache_bytes=found.cache_bytes
    )


def calibration_of(asked: Asked) -> Calibration | None:
    """Of this machine; None where it has none, or where another one is asked for."""
    return None if asked.other is not None else read_calibration(_calibration_place(asked))


def measured_of(asked: Asked) -> list[MeasuredFigure]:
    """What was predicted of this machine and measured since."""
    return read_measured(measured_file(_calibration_place(asked)))


def _calibration_place(asked: Asked) -> Path:
    import torch

    return asked.calibration or calibration_file(torch.get_num_threads())


def _elsewhere(planned: PlannedModel, asked: Asked, other: PlannedMachine, on: Circumstances) -> Circumstances:
    cluster = other.cluster
    rates = other.rates if asked.disk_rate is None or cluster else other.rates._replace(disk=asked.disk_rate)
    on = on._replace(free_bytes=asked.free_bytes or other.free_bytes, rates=rates)
    if cluster is None:
        return on._replace(peaks=Peaks(other.bandwidth, other.arithmetic))
    peaks = Peaks(cluster.bandwidth, cluster.operations(planned.precision))
    return on._replace(speed=cluster.speed(), peaks=peaks)


def kernel_rates(config: ModelConfig, *, is_quantized: bool) -> KernelRates:
    """Of experts of the model's sizes; measured within a second."""
    from qnext.ops.expert_rates import expert_rates

    return expert_rates(
        hidden_size=config.hidden_size,
        width=config.moe_intermediate_size or _WIDTH,
        top_k=config.num_experts_per_tok or _USED,
        is_quantized=is_quantized,
    )


PRECISIONS = (FLOAT_SCHEME, FP8_SCHEME, "int8", "int4-g32", "int4-g128")


def bytes_by_scheme(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Of each field of ParameterCounts, in the schemes that a plan may be made for, and `records`: of the experts where
    each is a record."""
    found = {}
    for scheme in PRECISIONS:
        planned = _in_scheme("", config, scheme)
        records = {"records": planned.sizes.experts.all_bytes} if planned.sizes.can_stream else {}
        found[scheme] = {**planned.part_bytes, **records}
    return found


def _in_scheme(name: str, config: ModelConfig, scheme: str) -> PlannedModel:
    if scheme == FP8_SCHEME:
        by_part = part_bytes(config, _fp8_bits)
        record, is_quantized = None, False
    else:
        by_part, record, is_quantized = _of_policy(config, scheme)
    experts = _expert_sizes(config, by_part, record)
    sizes = StoredSizes(_dense_bytes(config, by_part), experts, can_stream=record is not None)
    precision = next((each for each in ("int4", "int8") if scheme.startswith(each)), scheme)
    return PlannedModel(name, config, sizes, by_part, precision, is_quantized, [])


def _fp8_bits(info: ParameterInfo) -> float:
    """As the released FP8 checkpoints are stored."""
    return 8 + 32 / _FP8_BLOCK if info.kind in QUANTIZED else 16


def _of_policy(config: ModelConfig, scheme: str) -> tuple[dict[str, int], int | None, bool]:
    """Bytes by part; of an expert's record, None where there are none; whether anything is quantised."""
    from qnext.quant.scheme import make_policy

    policy = None if scheme == FLOAT_SCHEME else make_policy(scheme, head=None, is_tied=config.tie_word_embeddings)

    def bits_of(info: ParameterInfo) -> float:
        found = None if policy is None else policy.scheme_of(info)
        return 16.0 if found is None else found.bits + 16 / found.group_size

    form = MatrixForm("bfloat16")
    for info in list_parameters(config).values():
        found = None if policy is None else policy.scheme_of(info)
        if info.part == "experts" and found is not None:
            form = MatrixForm(f"int{found.bits}", found.group_size, "bfloat16")
    try:
        record: int | None = RecordLayout(config.hidden_size, config.moe_intermediate_size, form, form).stride
    except ValueError:  # no experts, or such as make no records
        record = None
    return part_bytes(config, bits_of), record, policy is not None


def _expert_sizes(config: ModelConfig, by_part: Mapping[str, int], record_bytes: int | None) -> ExpertSizes:
    """With records of so many bytes, or as large as the weights of an expert."""
    num_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    if record_bytes is None:
        record_bytes = by_part["experts"] // max(1, num_layers * config.num_experts)
    others = sum(by_part.values()) - by_part["experts"]
    return ExpertSizes(num_layers, config.num_experts, record_bytes, others)


def _dense_bytes(config: ModelConfig, by_part: Mapping[str, int]) -> int:
    """Of the trunk's weights that every token multiplies; of an embedding it looks up a row."""
    skipped = {"experts", "mtp", "not used"} | ({"embedding"} if not config.tie_word_embeddings else set())
    return sum(count for part, count in by_part.items() if part not in skipped)
