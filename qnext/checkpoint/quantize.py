"""A model folder to a quantised one, layer by layer. The memory stays near one layer and the text on its way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from qnext.checkpoint.calibrate import TextSample, run_layers
from qnext.checkpoint.check import Layout, layout_of, structure_problems
from qnext.checkpoint.files import MAX_SHARD_BYTES, Progress, TensorFiles
from qnext.checkpoint.provenance import Making, parent_of
from qnext.checkpoint.quantized_output import QuantizedOutput
from qnext.checkpoint.save import has_tokenizer, new_folder, write_side_files
from qnext.checkpoint.weight_source import FolderWeights
from qnext.config import to_hf
from qnext.errors import CorruptCheckpoint, UsageError, warn
from qnext.files import write_inside
from qnext.planning.plan import check_disk
from qnext.quant.report import QualityReport, TextComparison, summarize
from qnext.quant.scheme import QuantPolicy


@torch.no_grad()
def quantize_folder(
    source: str | Path | Layout,
    folder: str | Path,
    *,
    policy: QuantPolicy,
    sample: TextSample | None = None,
    is_calibrated: bool = True,
    with_records: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    making: Making | None = None,
) -> QualityReport:
    """Write `folder` in compressed-tensors' pack-quantized layout, with the tokenizer, and return what it cost.

    `with_records` experts become records, which other programs do not read.
    With `sample`, a text goes through the layers: matrices are rounded by GPTQ (to nearest where not `is_calibrated`),
    and both models are compared. Scales have the dtype of the kept matrices. Packed floats that are kept become bf16.
    `making` says what the caller knows of the text and the machine; the rest of the provenance is added here.
    Raises UsageError for a folder with integer codes or an output that exists, DoesNotFit when the disk is too small,
    CorruptCheckpoint for a damaged source.
    """
    layout = layout_of(source)
    check_source(layout)
    layout = layout.with_all_experts()
    path = layout.index.folder
    making = making or Making("quantize")
    making.parents.append(parent_of(layout))
    with TensorFiles(layout.index) as files:
        weights = FolderWeights(files, layout)
        out = QuantizedOutput(
            weights, policy, progress, name=path, with_records=with_records, max_shard_bytes=max_shard_bytes
        )
        comparison = TextComparison()
        check_disk(Path(folder), out.sink.num_bytes)
        with new_folder(folder, making=making) as temporary:
            write_config_of(out, temporary)
            write_side_files(temporary, layout.config, path if has_tokenizer(path) else None, None)
            try:
                out.sink.begin(temporary)
                if sample is None:
                    out.write_all()
                else:
                    run_layers(out, weights, sample, comparison, is_calibrated=is_calibrated)
                out.sink.finish()
            finally:
                out.sink.close()
            report = report_of(out, layout, policy)
            if sample is not None:
                report = _with_text(report, sample, comparison, is_calibrated=is_calibrated)
            describe_making(making, report, with_records=with_records)
    return report


def _with_text(
    report: QualityReport, sample: TextSample, comparison: TextComparison, *, is_calibrated: bool
) -> QualityReport:
    report = replace(report, text=comparison.result())
    if not is_calibrated:
        return report
    return replace(report, method="gptq", num_calibration_tokens=sum(len(ids) - 1 for ids in sample.calibration))


def describe_making(making: Making, report: QualityReport, *, with_records: bool = False) -> None:
    """Settings and quality of a quantised folder."""
    making.settings = {"scheme": report.scheme, "head": report.head, "method": report.method, **making.settings}
    if report.num_calibration_tokens:
        making.settings = {**making.settings, "calibration_tokens": report.num_calibration_tokens}
    if with_records:
        making.settings = {**making.settings, "records": True}
    making.quality = report.summary()


def report_of(out: QuantizedOutput, layout: Layout, policy: QuantPolicy) -> QualityReport:
    """Of weights that were rounded to nearest."""
    kinds, worst = summarize(out.errors)
    return QualityReport(
        scheme=policy.scheme.name,
        head=None if policy.head is None else policy.head.name,
        method="nearest",
        bytes_original=layout.num_bytes,
        bytes_quantized=out.sink.num_bytes,
        num_calibration_tokens=0,
        kinds=kinds,
        worst=worst,
        text=None,
    )


def check_source(layout: Layout) -> None:
    """Whether a folder is whole and can be rounded.

    Integer codes are refused: rounding them again adds to what they have lost. Of floats a warning says it.
    """
    folder, forms = layout.index.folder, layout.packed_forms
    codes = sorted(form.describe() for form in forms if form.keeps_codes)
    if codes:
        method = layout.quantization.method if layout.quantization is not None else "none"
        raise UsageError(f"{folder}: is quantised already ({method}: {codes[0]}); start from the original weights")
    small = sorted(form.describe() for form in forms if form.bits < 8)
    if small:
        warn(f"{folder}: weights in {small[0]} are rounded a second time; the original weights would lose less")
    for problem in structure_problems(layout):
        raise CorruptCheckpoint(problem)


def write_config_of(out: QuantizedOutput, folder: Path) -> None:
    values = to_hf(out.config, dtype=str(out.scale_dtype).removeprefix("torch."))
    quantization = out.describe()
    if quantization is not None:
        values["quantization_config"] = quantization
    write_inside(folder / "config.json", json.dumps(values, indent=2) + "\n")
