"""What of an engine's options can be refused before the weights are read, which takes minutes for a large model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from qnext.config import ModelConfig
from qnext.engine.cache import prompt_grid
from qnext.engine.sizes import checked_model_len, wants_drafter
from qnext.engine.step import check_step_size
from qnext.engine.storage.disk_folder import check_size, lock_folder, open_folder
from qnext.engine.storage.tiers import DiskCache, check_tiers


def check_options(
    config: ModelConfig,
    *,
    max_model_len: int | None = None,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int | None = None,
    speculation: bool | None = None,
    prefix_cache: bool = True,
    disk_cache: DiskCache | None = None,
    **others: Any,
) -> None:
    """Raises UsageError as an Engine of a model of this configuration would, for options by the names that it has.

    Whether sizes fit the memory is known only when the weights are there.
    """
    checked_model_len(config, max_model_len)
    wants_drafter(speculation, has_layer=config.num_nextn_predict_layers > 0)
    if max_num_batched_tokens is not None:
        grid = prompt_grid(torch.device("cpu"), others.get("state_dtype", torch.float32))
        check_step_size(max_num_batched_tokens, max_num_seqs=max_num_seqs, chunk_size=grid)
    check_tiers(prefix_cache, disk_cache, others.get("host_cache_bytes"))
    if disk_cache is not None:
        folder = Path(disk_cache.folder)
        check_size(folder, disk_cache.max_bytes)
        folder_fd = open_folder(folder)
        try:
            os.close(lock_folder(folder_fd, folder))
        finally:
            os.close(folder_fd)
