"""A model folder becomes another one of the same numbers: with experts in records, or without."""

from __future__ import annotations

from pathlib import Path

import torch

from qnext.checkpoint.check import Layout, layout_of, structure_problems
from qnext.checkpoint.files import MAX_SHARD_BYTES, Progress, TensorFiles
from qnext.checkpoint.provenance import Making, parent_of
from qnext.checkpoint.quantize import write_config_of
from qnext.checkpoint.quantized_output import QuantizedOutput
from qnext.checkpoint.save import has_tokenizer, new_folder, write_side_files
from qnext.checkpoint.weight_source import FolderWeights
from qnext.errors import CorruptCheckpoint
from qnext.planning.plan import check_disk


@torch.no_grad()
def rewrite_folder(
    source: str | Path | Layout,
    folder: str | Path,
    *,
    with_records: bool,
    keeps_codes: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write `folder` with the weights and the tokenizer of `source`, as a model holds them.

    Integer codes stay the same codes unless `keeps_codes` is false, in compressed-tensors' pack-quantized or in
    records; other packed weights become bf16. Raises UsageError for experts that make no records or an output that
    exists, DoesNotFit when the disk is too small, CorruptCheckpoint for a damaged source.
    """
    layout = layout_of(source).with_all_experts()
    for problem in structure_problems(layout):
        raise CorruptCheckpoint(problem)
    path = layout.index.folder
    settings = {"records": with_records, "codes": "kept" if keeps_codes else "dequantised"}
    making = Making("convert", settings, [parent_of(layout)])
    with TensorFiles(layout.index) as files:
        weights = FolderWeights(files, layout, keeps_codes=keeps_codes)
        out = QuantizedOutput(
            weights, None, progress, name=path, with_records=with_records, max_shard_bytes=max_shard_bytes
        )
        check_disk(Path(folder), out.sink.num_bytes)
        with new_folder(folder, making=making) as temporary:
            write_config_of(out, temporary)
            write_side_files(temporary, layout.config, path if has_tokenizer(path) else None, None)
            try:
                out.sink.begin(temporary)
                out.write_all()
                out.sink.finish()
            finally:
                out.sink.close()
