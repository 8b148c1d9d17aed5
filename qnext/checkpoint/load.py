"""A model folder to a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.checkpoint.check import FLOAT_DTYPES, Layout, layout_of, structure_problems
from qnext.checkpoint.codes import Codes, Fp8Codes, coded_parameters, fp8_parameters
from qnext.checkpoint.cut import RankRows, cut_layout
from qnext.checkpoint.files import TORCH_DTYPES, Progress, TensorFiles
from qnext.checkpoint.finite import is_finite
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.hosted import DeviceRoom, host_experts, hosted_parameters
from qnext.checkpoint.packed_values import fp8_blocks, packed_blocks
from qnext.checkpoint.record_tables import RecordTables
from qnext.checkpoint.record_values import record_problem
from qnext.checkpoint.streamed import layer_of, look_ahead, open_streamed
from qnext.checkpoint.values import not_finite, read_weight, tensor_value_problems
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint, NotSupported, UsageError
from qnext.model import CausalLM, HoldsWeights
from qnext.parallel.modules import OnRank, make_sharded
from qnext.planning import Kind
from qnext.residency.remembered import recalling
from qnext.residency.store import ResidencyPlan


@torch.no_grad()
def load_model(
    folder: str | Path | Layout,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    dequantize: bool = False,
    residency: ResidencyPlan | DeviceRoom | None = None,
    on_rank: OnRank | None = None,
    progress: Progress | None = None,
) -> CausalLM:
    """The model in a Hugging Face folder of safetensors files, or in the folder that a Layout was read from.

    `dtype` None keeps the stored dtype, tensor by tensor; FP8 stays FP8 where the device's kernels read it (see
    ops.reads_fp8), and becomes bfloat16 elsewhere. Integer codes stay codes. Gates always become tensors, and all
    weights with `dequantize`. With `residency` experts stay on disk, or on the host, until they are needed;
    `on_rank` reads one rank's part. `progress` gets the bytes read and the bytes in all. Warns of what is ignored.
    Raises ModelNotFound, ConfigError, CorruptCheckpoint for a missing, surplus, misshaped or (with `check_finite`)
    non-finite tensor, NotSupported for a form that is not read, UsageError for what does not fit together.
    """
    layout = layout_of(folder)
    for problem in structure_problems(layout):
        raise CorruptCheckpoint(problem)
    device, room = torch.device(device), None
    if isinstance(residency, DeviceRoom):
        residency, room = None, residency
    if residency is not None and device.type != "cpu":
        raise NotSupported(f"{layout.index.folder}: experts on disk are computed on the CPU, not on {device}")
    streamed = {} if residency is None else open_streamed(layout, residency)
    if on_rank is not None:
        layout, on_rank = _cut(layout, on_rank, set(map(layer_of, streamed)))
    has_tables = not dequantize and on_rank is None and device.type == "cpu" and room is None
    tables = RecordTables(RecordTables.serve(layout, but=set(map(layer_of, streamed))) if has_tables else [])
    given = {**streamed, **tables.weights}
    layout = layout.with_experts_of(layout.records.keys() - set(map(layer_of, given)))
    with TensorFiles(layout.index) as files, _recalling(streamed, residency):
        codes: dict[str, Codes | Fp8Codes] = {} if dequantize else {**coded_parameters(layout, files)}
        if dtype is None and not dequantize and ops.reads_fp8(device):
            codes |= fp8_parameters(layout, files)
        dtypes = _parameter_dtypes(layout, files.tensors, dtype, codes.keys() | given.keys())
        make = None if on_rank is None else partial(make_sharded, *on_rank)
        places = Places(device, frozenset() if room is None else hosted_parameters(layout))
        model = empty_model(layout.config, dtypes=dtypes, places=places, quantized=codes, given=given, make=make)
        _fill(model, layout, files, tables, check_finite=check_finite, progress=progress)
    if room is not None:
        host_experts(model, room, device)
    look_ahead(model, None if on_rank is None else on_rank.shard)
    return model


def fill_parameters(
    model: CausalLM, rows: RankRows | None, *, layout: Layout, progress: Progress | None = None
) -> None:
    """Read a folder whose weights are all plain into the parameters of `model`, in their dtypes: all of it, or what
    `rows` names, which are the rows of these parameters then. Raises as load_model."""
    assert is_plain(layout), layout.index.folder
    for problem in structure_problems(layout):
        raise CorruptCheckpoint(problem)
    if rows is not None:
        layout = cut_layout(layout, rows)
    with TensorFiles(layout.index) as files:
        _fill(model, layout, files, RecordTables([]), check_finite=True, progress=progress)


def is_plain(layout: Layout) -> bool:
    """Whether every weight is stored as its numbers, which are read apart by rows."""
    return not layout.packed and not layout.records


def stored_dtypes(layout: Layout) -> dict[str, torch.dtype]:
    """Of the parameters of a folder that is plain."""
    return _parameter_dtypes(layout, layout.index.tensors, None, set())


def _cut(layout: Layout, on_rank: OnRank, streamed: set[str]) -> tuple[Layout, OnRank]:
    """What a rank reads at once, and its shard with the layers that it streams."""
    numbers = frozenset(int(layer.rpartition(".")[2]) for layer in streamed)
    shard = replace(on_rank.shard, streamed=numbers)
    return cut_layout(layout, shard, but=streamed), on_rank._replace(shard=shard)


def _recalling(streamed: Mapping[str, ops.RecordWeight], plan: ResidencyPlan | None) -> AbstractContextManager[object]:
    """Experts of the last run come into memory while other weights are read, where the plan says so."""
    folder = None if plan is None else plan.remembered_in
    records = next((weight.records for weight in streamed.values()), None)
    if folder is None or not isinstance(records, ops.StreamedExperts):
        return nullcontext()
    return recalling(records.residency, folder)


def _fill(
    model: CausalLM,
    layout: Layout,
    files: TensorFiles,
    tables: RecordTables,
    *,
    check_finite: bool,
    progress: Progress | None,
) -> None:
    """Everything that the folder holds into the room that is there for it."""
    read = {name: info for name, info in files.tensors.items() if name not in layout.unlisted_tensors}
    modules = dict(model.named_modules())
    total = tables.num_bytes + sum(info.num_bytes for info in read.values())
    tables.read(layout, files, check_finite=check_finite)
    done = tables.num_bytes
    for name, info in read.items():
        role = layout.roles.get(name)
        if role is None and name in layout.targets:
            damage = record_problem(layout.records, files, info) if layout.records else None
            if damage is not None:
                raise CorruptCheckpoint(damage)
            _copy(layout, files, name, modules, check_finite)
        elif role is None:
            _check(layout, files, name, check_finite)
        elif role.kind == "codes":
            # The small tensors of a packed weight are read with its codes, wherever they lie.
            for wanted in layout.packed[role.weight].stored.values():
                _check(layout, files, wanted.name, check_finite)
            _copy(layout, files, role.weight, modules, check_finite)
        done += info.num_bytes
        if progress is not None:
            progress(done, total)


class Places(NamedTuple):
    """Where parameters are: on a device, but for those that wait for it on the host."""

    device: torch.device = torch.device("cpu")
    hosted: frozenset[str] = frozenset()


HERE = Places()


def empty_model(
    config: ModelConfig,
    *,
    dtypes: Mapping[str, torch.dtype] | torch.dtype,
    places: Places = HERE,
    quantized: Mapping[str, Codes | Fp8Codes] | None = None,
    given: Mapping[str, ops.Weight] | None = None,
    make: Callable[[], CausalLM] | None = None,
) -> CausalLM:
    """A model whose parameters have memory at their `places` but no values yet. A tied head stays tied.

    In place of the parameters in `quantized` there is memory for codes, which ops.write_quantized fills. Those in
    `given` are there. `make` makes another model than `config` describes.
    """
    with torch.device("meta"):
        model = CausalLM(config) if make is None else make()
    made: dict[int, nn.Parameter] = {}
    storage: list[Tensor] = []
    for prefix, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if given and f"{prefix}.{key}" in given:
                assert isinstance(module, HoldsWeights)
                module.set_weight(key, given[f"{prefix}.{key}"])
                continue
            if quantized and f"{prefix}.{key}" in quantized:
                weight = _empty_codes(quantized[f"{prefix}.{key}"], places, f"{prefix}.{key}")
                assert isinstance(module, HoldsWeights)
                module.set_weight(key, weight)
                storage += weight.tensors
                continue
            if id(parameter) not in made:
                dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[f"{prefix}.{key}"]
                empty = ops.empty_hosted if f"{prefix}.{key}" in places.hosted else ops.empty_huge
                made[id(parameter)] = nn.Parameter(empty(parameter.shape, dtype=dtype, device=places.device))
                storage.append(made[id(parameter)])
            module._parameters[key] = made[id(parameter)]
    ops.touch(storage)
    return model


def _check(layout: Layout, files: TensorFiles, name: str, check_finite: bool) -> None:
    for problem in tensor_value_problems(layout, files, files.tensors[name], check_finite=check_finite):
        raise CorruptCheckpoint(problem)


def _empty_codes(codes: Codes | Fp8Codes, places: Places, name: str) -> ops.Weight:
    where: dict[str, Any] = {"device": places.device, "is_hosted": name in places.hosted}
    if isinstance(codes, Fp8Codes):
        return ops.empty_fp8(codes.shape, block=codes.block, scale_dtype=codes.scale_dtype, **where)
    return ops.empty_quantized(
        codes.shape,
        bits=codes.bits,
        group_size=codes.group_size,
        scale_dtype=codes.scale_dtype,
        has_zeros=codes.has_zeros,
        **where,
    )


def _copy(layout: Layout, files: TensorFiles, name: str, modules: Mapping[str, nn.Module], check_finite: bool) -> None:
    """One weight of the disk, by name, into its place. A plain one is checked on the way, others were."""
    parameter, part = layout.targets[name]
    prefix, _, key = parameter.name.rpartition(".")
    destination = getattr(modules[prefix], key)
    if not isinstance(destination, Tensor):
        row = 0 if part.rows is None else part.rows[0]
        packed = layout.packed[name]
        blocks = fp8_blocks(packed, files) if packed.form.layout == "fp8" else packed_blocks(packed, files)
        for first, rows in blocks:
            ops.write_quantized(destination, rows, expert=part.expert, row=row + first)
        return
    place = destination.data[part.place]
    if name in layout.packed:
        place.copy_(read_weight(layout, files, name, dtype=place.dtype))
    else:
        is_final = place.dtype == TORCH_DTYPES[files.tensors[name].dtype] and place.device.type == "cpu"
        parts = place.view(-1).split(files.piece_items(name))
        for to, piece in zip(parts, files.pieces(name, into=place if is_final else None), strict=True):
            if check_finite and not is_finite(piece):
                raise CorruptCheckpoint(not_finite(files.tensors[name]))
            if not is_final:
                to.copy_(piece)
    is_half = name in files.tensors and files.tensors[name].dtype == "F16"
    if place.dtype == torch.float16 and not is_half and not is_finite(place):
        stored = layout.packed[name].stored["codes"].name if name in layout.packed else name
        raise UsageError(f"{files.tensors[stored].file}: tensor {stored} holds numbers beyond the range of float16")


def _parameter_dtypes(
    layout: Layout, tensors: Mapping[str, TensorInfo], wanted: torch.dtype | None, quantized: set[str]
) -> dict[str, torch.dtype]:
    """dtype of each parameter but those in `quantized`: as stored, the widest where its parts differ.

    Packed weights that become tensors take the embedding's, or bfloat16 where that is packed too. A `wanted` dtype
    leaves a router as it is that is stored wider than the embedding: somebody kept the last bits that choose experts.
    """
    embedding = _stored_dtype(tensors.get("model.embed_tokens.weight"))
    dtypes: dict[str, torch.dtype] = {}
    for name, (parameter, _) in layout.targets.items():
        if parameter.name in quantized:
            continue
        stored = embedding if name in layout.packed else _stored_dtype(tensors[name])
        is_wide_router = parameter.kind is Kind.ROUTER and torch.promote_types(stored, embedding) != embedding
        if wanted is not None:
            stored = torch.promote_types(stored, wanted) if is_wide_router else wanted
        dtypes[parameter.name] = torch.promote_types(dtypes.get(parameter.name, stored), stored)
    return dtypes


def _stored_dtype(info: TensorInfo | None) -> torch.dtype:
    """What is packed becomes bfloat16."""
    return torch.bfloat16 if info is None or info.dtype not in FLOAT_DTYPES else TORCH_DTYPES[info.dtype]
