"""A model folder becomes a quantised one, layer by layer: memory stays near one layer and the text on its way.

Legend: T tokens, D hidden, Y vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qnext.checkpoint.check import Layout, read_layout, structure_problems
from qnext.checkpoint.files import MAX_SHARD_BYTES, TORCH_DTYPES, ShardWriter, TensorFiles, TensorSpec
from qnext.checkpoint.names import Part, disk_parts
from qnext.checkpoint.save import has_tokenizer, new_folder, write_side_files
from qnext.checkpoint.values import read_weight, tensor_value_problems
from qnext.checkpoint.write_behind import WriteBehind
from qnext.config import ModelConfig, to_hf
from qnext.errors import CorruptCheckpoint, DoesNotFit, UsageError, warn
from qnext.files import write_inside
from qnext.ops import QuantizedWeight
from qnext.planning import parameter_shapes
from qnext.quant.formats import PackedGroup, compressed_tensors_config, compressed_tensors_of, compressed_tensors_specs
from qnext.quant.layer import Rounded
from qnext.quant.report import QualityReport, TensorError, TextComparison, measure_error, summarize
from qnext.quant.rounding import round_nearest
from qnext.quant.scheme import QuantPolicy, QuantScheme

Progress = Callable[[int, int], None]
_READ_AHEAD_BYTES = 64 << 20
_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TextSample(NamedTuple):
    """Token ids, each sequence with the token after it: some to calibrate on, others to measure on."""

    calibration: Sequence[Tensor]
    evaluation: Sequence[Tensor]


@torch.no_grad()
def quantize_folder(
    source: str | Path,
    folder: str | Path,
    *,
    policy: QuantPolicy,
    sample: TextSample | None = None,
    is_calibrated: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> QualityReport:
    """Write `folder` in compressed-tensors' pack-quantized layout, the tokenizer with it, and say what it cost.

    With `sample`, text runs through the layers: matrices are rounded by GPTQ (to nearest where not `is_calibrated`),
    and both models are compared. Scales have the dtype of the kept matrices; packed floats that are kept become bf16.
    `progress` is called with bytes of the source done and in all. Raises UsageError for a folder that is quantised
    already (floats are not meant) or an output that exists, DoesNotFit when the disk is too small, CorruptCheckpoint
    for a damaged source.
    """
    source = Path(source)
    with TensorFiles(source) as files:
        layout = read_layout(files.folder, files.tensors)
        _refuse_quantized(layout, source)
        for problem in structure_problems(layout, files.tensors, files.folder):
            raise CorruptCheckpoint(problem)
        out = QuantizedOutput(files, layout, policy, progress)
        if not out.num_quantized:
            raise UsageError(f"{source}: no matrix has inputs in whole groups of {policy.scheme.group_size}")
        comparison = TextComparison()
        _check_disk(Path(folder), out.num_bytes)
        with new_folder(folder) as temporary:
            _write_config(temporary, layout.config, out)
            write_side_files(temporary, layout.config, source if has_tokenizer(source) else None, None)
            writer = WriteBehind(ShardWriter(temporary, out.plan, max_shard_bytes=max_shard_bytes))
            try:
                out.writer = writer
                if sample is None:
                    out.round_all()
                else:
                    from qnext.checkpoint.calibrate import run_layers

                    run_layers(out, sample, comparison, is_calibrated=is_calibrated)
                writer.finish()
            finally:
                writer.close()
    kinds, worst = summarize(out.errors)
    uses_gptq = sample is not None and is_calibrated
    return QualityReport(
        policy.scheme.name, None if policy.head is None else policy.head.name, "gptq" if uses_gptq else "nearest",
        sum(info.num_bytes for info in files.tensors.values()), out.num_bytes,
        sum(len(ids) - 1 for ids in sample.calibration) if sample is not None and uses_gptq else 0,
        kinds, worst, comparison.result(),
    )  # fmt: skip


class QuantizedOutput:
    """Reads parameters of the source, and writes each of them kept or rounded."""

    def __init__(self, files: TensorFiles, layout: Layout, policy: QuantPolicy, progress: Progress | None) -> None:
        self.files = files
        self.layout = layout
        self.config = layout.config
        self.shapes = parameter_shapes(layout.config)
        self.errors: list[TensorError] = []
        self.writer: WriteBehind | None = None
        self._policy = policy
        self._progress = progress
        self._done = 0
        self._total = sum(info.num_bytes for info in files.tensors.values())
        self.scale_dtype = self.kept_dtype("model.embed_tokens.weight")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise UsageError(f"{files.folder}: weights in {self.scale_dtype} cannot be quantised")
        self.plan: dict[str, TensorSpec] = {}
        self.kept_matrices: list[str] = []
        for name, target in layout.targets.items():
            scheme = policy.scheme_of(name, target.part.shape)
            if scheme is None:
                self.plan[name] = TensorSpec(self.kept_dtype(name), target.part.shape)
                if len(target.part.shape) > 1:
                    self.kept_matrices.append(name)
                continue
            num_outputs, num_inputs = target.part.shape
            specs = compressed_tensors_specs(
                name.removesuffix(".weight"), (num_outputs, num_inputs), bits=scheme.bits, group_size=scheme.group_size,
                scale_dtype=self.scale_dtype,
            )  # fmt: skip
            self.plan.update({key: TensorSpec(*spec) for key, spec in specs.items()})

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.plan.values())

    @property
    def num_quantized(self) -> int:
        return sum(name.endswith(".weight_packed") for name in self.plan)

    @property
    def schemes(self) -> tuple[QuantScheme, QuantScheme | None]:
        return self._policy.scheme, self._policy.head if "lm_head.weight_packed" in self.plan else None

    def kept_dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self.layout.packed else TORCH_DTYPES[self.files.tensors[name].dtype]

    def scheme_of(self, parameter: str) -> QuantScheme | None:
        part = disk_parts(parameter, self.shapes[parameter])[0]
        return self._policy.scheme_of(part.name, part.shape)

    def read_part(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight of the source, checked; packed floats become numbers."""
        for stored in self.layout.stored_names(name):
            for problem in tensor_value_problems(self.layout, self.files, self.files.tensors[stored]):
                raise CorruptCheckpoint(problem)
        return read_weight(self.layout, self.files, name, dtype=dtype)

    def read_parameter(self, name: str) -> Tensor:
        """A parameter of the model in fp32, experts stacked."""
        values = torch.empty(self.shapes[name])
        for part in disk_parts(name, self.shapes[name]):
            values[part.place] = self.read_part(part.name, torch.float32)
        return values

    def keep(self, name: str) -> None:
        """Write a parameter as it is."""
        for part in disk_parts(name, self.shapes[name]):
            self._keep_part(part.name)

    def round_all(self) -> None:
        """Write all parameters, rounded to nearest where the policy quantises them, one tensor of the disk at a time.

        What comes next is read meanwhile.
        """
        parts = [(name, part) for name, shape in self.shapes.items() for part in disk_parts(name, shape)]
        num_expected = num_ahead = 0
        for name, part in parts:
            while num_expected < len(parts) and num_ahead < _READ_AHEAD_BYTES:
                expected = parts[num_expected][1].name
                for stored in self.layout.stored_names(expected):
                    self.files.expect(stored)
                num_expected += 1
                num_ahead += self._stored_bytes(expected)
            self._round_part(name, part)
            num_ahead -= self._stored_bytes(part.name)

    def _stored_bytes(self, name: str) -> int:
        return sum(self.files.tensors[stored].num_bytes for stored in self.layout.stored_names(name))

    def _round_part(self, name: str, part: Part) -> None:
        scheme = self._policy.scheme_of(part.name, part.shape)
        if scheme is None:
            self._keep_part(part.name)
            return
        original = self.read_part(part.name, self.kept_dtype(part.name))
        weight = round_nearest(original, scheme, scale_dtype=self.scale_dtype)
        self._write_rounded(part, Rounded(name, None, original, weight, None), slice(None))

    def write(self, name: str, rounded: Rounded) -> None:
        """Write what became of the parameter `name`, or of one expert of it."""
        for part in disk_parts(name, self.shapes[name]):
            if part.expert == rounded.expert:
                self._write_rounded(part, rounded, slice(None) if part.rows is None else slice(*part.rows))

    def _write_rounded(self, part: Part, rounded: Rounded, rows: slice) -> None:
        assert self.writer is not None
        weight = rounded.weight
        weight = QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.bits, weight.group_size)
        for key, tensor in compressed_tensors_of(part.name.removesuffix(".weight"), weight).items():
            self.writer.write(key, tensor)
        self.errors.append(measure_error(part.name, rounded, rows))
        self._count(part.name)

    def _keep_part(self, name: str) -> None:
        assert self.writer is not None
        self.writer.write(name, self.read_part(name, self.kept_dtype(name)))
        self._count(name)

    def _count(self, name: str) -> None:
        self._done += self._stored_bytes(name)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module that was made on the meta device its parameters, in fp32."""
        for path, owner in module.named_modules():
            for key in list(owner._parameters):
                if owner._parameters[key] is not None:
                    name = ".".join(piece for piece in (prefix.rstrip("."), path, key) if piece)
                    owner._parameters[key] = nn.Parameter(self.read_parameter(name), requires_grad=False)

    def names_below(self, prefix: str) -> Iterator[str]:
        return (name for name in self.shapes if name.startswith(prefix))


def _refuse_quantized(layout: Layout, source: Path) -> None:
    """Integer codes are refused: rounding them again adds to what they have lost. Of floats a warning says it."""
    forms = {packed.form for packed in layout.packed.values()}
    codes = sorted(form.describe() for form in forms if form.keeps_codes)
    if codes:
        method = layout.quantization.method if layout.quantization is not None else "none"
        raise UsageError(f"{source}: is quantised already ({method}: {codes[0]}); start from the original weights")
    small = sorted(form.describe() for form in forms if form.bits < 8)
    if small:
        warn(f"{source}: weights in {small[0]} are rounded a second time; the original weights would lose less")


def _check_disk(folder: Path, needed: int) -> None:
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise DoesNotFit(f"{folder}: needs {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of {parent} are free")


def _write_config(folder: Path, config: ModelConfig, out: QuantizedOutput) -> None:
    values = to_hf(config, dtype=str(out.scale_dtype).removeprefix("torch."))
    values["quantization_config"] = quantization_config(out)
    write_inside(folder / "config.json", json.dumps(values, indent=2) + "\n")


def quantization_config(out: QuantizedOutput) -> dict[str, Any]:
    """How compressed-tensors describes the folder.

    `ignore` holds exact names of modules, as the tensors are called on disk: readers that fuse modules look up each
    part. The embedding is no Linear and need not be named.
    """
    scheme, head = out.schemes
    groups = [PackedGroup(scheme.bits, scheme.group_size, ["Linear"])]
    if head is not None and head != scheme:
        groups.append(PackedGroup(head.bits, head.group_size, ["lm_head"]))
    ignored = [name.removesuffix(".weight") for name in out.kept_matrices if name != "model.embed_tokens.weight"]
    if out.config.tie_word_embeddings:
        ignored.append("lm_head")
    return compressed_tensors_config(groups, ignore=ignored)
