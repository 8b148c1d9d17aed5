"""An adapter and the folder that it was trained on become a folder of their own.

What the adapter does not touch is copied byte by byte. What it changes is computed in fp32 and rounded once, in the
form in which it lies there.

Legend: F outputs, D inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext import files
from qnext.checkpoint.adapters import find_adapter, open_adapter, read_adapter
from qnext.checkpoint.check import Layout, layout_of, structure_problems
from qnext.checkpoint.files import MAX_SHARD_BYTES, TORCH_DTYPES, Progress, ShardWriter, TensorFiles, TensorSpec
from qnext.checkpoint.packed import PackedWeight
from qnext.checkpoint.provenance import Making, adapter_parent, parent_of
from qnext.checkpoint.resolve import resolve_model
from qnext.checkpoint.save import has_tokenizer, new_folder, write_side_files
from qnext.checkpoint.values import read_sound_weight
from qnext.config import is_wrapped, load_config_json, to_hf
from qnext.errors import CorruptCheckpoint, NotSupported, UsageError
from qnext.lora import Adapter, describe_adapter
from qnext.planning import list_parameters
from qnext.planning.plan import check_disk
from qnext.quant.float_formats import from_fp8, to_fp8
from qnext.quant.formats import compressed_tensors_of
from qnext.quant.rounding import round_nearest
from qnext.quant.scheme import QuantScheme

_OTHER_FILES = ("hf_quant_config.json",)


@dataclass
class FormError:
    """What rounding to one form cost: sums of squares over all weights of that form."""

    num_weights: int = 0
    of_weights: float = 0.0
    of_change: float = 0.0
    of_error: float = 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self.of_error / max(self.of_weights, 1e-300))

    @property
    def change(self) -> float:
        return math.sqrt(self.of_change / max(self.of_weights, 1e-300))

    def line(self, form: str) -> str:
        verb = "rounded once" if form.startswith("torch.") else "rounded again"
        return (
            f"{self.num_weights:,} weights in {form.removeprefix('torch.')} {verb}: error {self.error:.2%} of the "
            f"weights, where the adapter changes {self.change:.2%}"
        )


@dataclass
class MergeReport:
    """What was merged, and what rounding cost, by form."""

    num_parameters: int  # of the model that changed
    num_copied: int  # tensors that were copied byte by byte
    errors: dict[str, FormError] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What rounding cost, as shares of the weights, by form."""
        return {
            form.removeprefix("torch."): {"weights": error.num_weights, "error": error.error, "change": error.change}
            for form, error in self.errors.items()
        }

    def lines(self) -> list[str]:
        head = f"{self.num_parameters} parameters changed, {self.num_copied:,} tensors copied as they are"
        return [head, *(error.line(form) for form, error in self.errors.items())]


def merge_adapter(
    source: str | Path, folder: str | Path, *, base: str | None = None, progress: Progress | None = None
) -> MergeReport:
    """Merge an adapter's folder, or the adapter of a run, into the model `base`, or the one that the adapter names.

    Raises NoEffect for an adapter that changes nothing, ModelNotFound where there is no adapter or no base, and the
    errors of read_adapter, resolve_model and merge_folder.
    """
    found = open_adapter(find_adapter(source))
    name = base or found.base
    if name is None:
        raise UsageError(f"{found.folder}: says of no model that it belongs to; --base names it")
    layout = layout_of(resolve_model(name))
    adapter = read_adapter(found, layout.config)
    described = describe_adapter(adapter)
    if len(described.without_effect) == described.num_matrices:
        described.check()
    tokenizer = found.folder if has_tokenizer(found.folder) else None
    making = Making("merge", parents=[adapter_parent(found.folder)])
    return merge_folder(layout, adapter, folder, tokenizer_folder=tokenizer, progress=progress, making=making)


@torch.no_grad()
def merge_folder(
    source: str | Path | Layout,
    adapter: Adapter,
    folder: str | Path,
    *,
    tokenizer_folder: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    making: Making | None = None,
) -> MergeReport:
    """Write `folder`: the model in `source` with the changes of `adapter`, every weight in its form there, and the
    tokenizer of `tokenizer_folder`, or of `source`. `making` says where the adapter comes from.

    Raises UsageError for an adapter of another model or an output that exists, NotSupported naming a weight in a form
    that is not written, CorruptCheckpoint for a damaged source, DoesNotFit when the disk is too small.
    """
    layout = layout_of(source)
    for problem in structure_problems(layout):
        raise CorruptCheckpoint(problem)
    if layout.records:
        raise NotSupported(
            f"{layout.index.folder}: holds its experts in records; `qnext convert {layout.index.folder} OUT` makes a "
            "folder without them, to merge into"
        )
    changed = _changed_weights(layout, adapter)
    plan = {info.name: TensorSpec(TORCH_DTYPES[info.dtype], info.shape) for info in layout.index.tensors.values()}
    total = sum(spec.num_bytes for spec in plan.values())
    check_disk(Path(folder), total)
    report = MergeReport(len(adapter.parts), 0)
    done = 0
    making = making or Making("merge")
    making.parents.insert(0, parent_of(layout, "base"))
    with TensorFiles(layout.index) as tensors, new_folder(folder, making=making) as made:
        _write_side_files(layout, made, tokenizer_folder)
        writer = ShardWriter(made, plan, max_shard_bytes=max_shard_bytes)
        try:
            for name, tensor in _all_tensors(layout, adapter, tensors, changed, report):
                writer.write(name, tensor)
                done += tensor.nbytes
                if progress is not None:
                    progress(done, total)
            writer.finish()
        finally:
            writer.close()
        making.quality = report.summary()
    return report


def _changed_weights(layout: Layout, adapter: Adapter) -> dict[str, PackedWeight | None]:
    """By name on disk, the weights that the adapter changes, and how they are packed."""
    adapter.check(list_parameters(layout.config))
    changed: dict[str, PackedWeight | None] = {}
    for name, target in layout.targets.items():
        if target.parameter.name not in adapter.parts or not adapter.changes(target.parameter.name, target.part.expert):
            continue
        packed = changed[name] = layout.packed.get(name)
        if packed is not None and not _is_written(packed):
            raise NotSupported(
                f"{layout.index.folder}: {name} lies in {packed.form.describe()}, which is not written; merge into "
                "the original weights and quantise those"
            )
    return changed


def _is_written(packed: PackedWeight) -> bool:
    form = packed.form
    if form.layout == "fp8":
        return True
    return (
        form.layout == "pack-quantized" and form.bits in (4, 8) and form.is_symmetric and "index" not in packed.stored
    )


def _all_tensors(
    layout: Layout,
    adapter: Adapter,
    tensors: TensorFiles,
    changed: Mapping[str, PackedWeight | None],
    report: MergeReport,
) -> Iterator[tuple[str, Tensor]]:
    made_elsewhere = {name for weight in changed for name in layout.stored_names(weight)}
    for name in layout.index.tensors:
        if name not in made_elsewhere:
            report.num_copied += 1
            yield name, tensors.read(name)
    for name, packed in changed.items():
        parameter, part = layout.targets[name]
        before = read_sound_weight(layout, tensors, name, dtype=torch.float32)
        delta = adapter.delta(parameter.name, part.expert)
        assert delta is not None
        if part.rows is not None:
            delta = delta[slice(*part.rows)]
        wanted = before + delta
        if not bool(torch.isfinite(wanted).all()):
            raise CorruptCheckpoint(f"{name}: is not finite after the merge")
        made, numbers, form = _encoded(name, wanted, packed, tensors)
        error = report.errors.setdefault(form, FormError())
        error.num_weights += 1
        error.of_weights += _energy(wanted)
        error.of_change += _energy(delta)
        error.of_error += _energy(numbers - wanted)
        yield from made.items()


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())


def _encoded(
    name: str, values_FD: Tensor, packed: PackedWeight | None, tensors: TensorFiles
) -> tuple[dict[str, Tensor], Tensor, str]:
    """The tensors of a weight in its form, the numbers that they stand for, and the form for people."""
    if packed is None:
        dtype = TORCH_DTYPES[tensors.tensors[name].dtype]
        rounded = values_FD.to(dtype)
        return {name: rounded}, rounded.float(), str(dtype)
    stored = {kind: tensors.tensors[each.name] for kind, each in packed.stored.items() if each.name in tensors.tensors}
    scale_dtype = TORCH_DTYPES[stored["scales"].dtype]
    if packed.form.layout == "fp8":
        assert packed.form.block is not None
        codes, scales = to_fp8(
            values_FD,
            block=packed.form.block,
            code_dtype=TORCH_DTYPES[stored["codes"].dtype],
            scale_dtype=scale_dtype,
        )
        made = {stored["codes"].name: codes, stored["scales"].name: scales.reshape(stored["scales"].shape)}
        numbers = from_fp8(codes, scales, block=packed.form.block, dtype=torch.float32)
        return made, numbers, packed.form.describe()
    scheme = QuantScheme("", packed.form.bits, packed.group_size)
    weight = round_nearest(values_FD, scheme, scale_dtype=scale_dtype)
    made = compressed_tensors_of(name.removesuffix(".weight"), weight)
    made = {key: tensor.reshape(tensors.tensors[key].shape) for key, tensor in made.items() if key in tensors.tensors}
    return made, weight.dequantize(), packed.form.describe()


def _write_side_files(layout: Layout, made: Path, tokenizer_folder: Path | None) -> None:
    """The configuration as it is, or that of the language model alone, and the tokenizer."""
    root = layout.index.folder
    values = load_config_json(root / "config.json")
    if is_wrapped(values):
        quantization = values.get("quantization_config")
        values = to_hf(layout.config, dtype=str(_embedding_dtype(layout)).removeprefix("torch."))
        if quantization is not None:
            values["quantization_config"] = quantization
        files.write_inside(made / "config.json", json.dumps(values, indent=2) + "\n")
    else:
        files.copy_inside(root / "config.json", made / "config.json")
    tokenizer = tokenizer_folder or (root if has_tokenizer(root) else None)
    write_side_files(made, layout.config, tokenizer, None)
    for name in _OTHER_FILES:
        if (root / name).is_file():
            files.copy_inside(root / name, made / name)


def _embedding_dtype(layout: Layout) -> torch.dtype:
    return TORCH_DTYPES[layout.index.tensors["model.embed_tokens.weight"].dtype]
