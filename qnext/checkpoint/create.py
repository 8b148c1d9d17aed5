"""A folder with random weights, made tensor by tensor. The model is never in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from qnext.checkpoint.files import MAX_SHARD_BYTES, Progress
from qnext.checkpoint.provenance import Making
from qnext.checkpoint.quantize import write_config_of
from qnext.checkpoint.quantized_output import QuantizedOutput
from qnext.checkpoint.save import new_folder, write_side_files
from qnext.checkpoint.weight_source import RandomWeights
from qnext.config import ModelConfig
from qnext.planning.plan import check_disk
from qnext.quant.scheme import QuantPolicy


def create_folder(
    config: ModelConfig,
    folder: str | Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    policy: QuantPolicy | None = None,
    with_records: bool = False,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write the model that `initialize(CausalLM(config), seed=seed)` makes, rounded to `dtype`.

    With `policy` the folder is quantised as quantize_folder would do it, bit for bit; `with_records` likewise. The
    memory stays near that of the largest tensor. Raises UsageError when `folder` exists and is not empty or experts
    make no records, DoesNotFit when the disk is too small.
    """
    out = QuantizedOutput(
        RandomWeights(config, seed=seed, dtype=dtype),
        policy,
        progress,
        name=folder,
        with_records=with_records,
        max_shard_bytes=max_shard_bytes,
    )
    settings = {"seed": seed, "dtype": str(dtype).removeprefix("torch."), "scheme": policy and policy.scheme.name}
    with new_folder(folder, making=Making("init", {**settings, "records": with_records or None})) as temporary:
        check_disk(Path(folder), out.sink.num_bytes)
        write_config_of(out, temporary)
        write_side_files(temporary, config, tokenizer_folder, None)
        try:
            out.sink.begin(temporary)
            out.write_all()
            out.sink.finish()
        finally:
            out.sink.close()
