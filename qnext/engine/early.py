"""What of an engine's options can be refused before the weights are read, which takes minutes for a large model."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from qnext.config import ModelConfig
from qnext.engine.config import EngineConfig
from qnext.engine.execution.cache import prompt_grid
from qnext.engine.policy.step import check_step_size
from qnext.engine.sizes import wants_drafter
from qnext.engine.storage.disk_folder import check_size, lock_folder, open_folder
from qnext.engine.storage.tiers import check_tiers
from qnext.ops import backend_of
from qnext.planning.plan import checked_model_len


def check_options(model_config: ModelConfig, config: EngineConfig, device: torch.device) -> None:
    """Raises UsageError as `Engine.of` would for a model of this configuration on `device`.

    Whether sizes fit the memory, and whether prompts can be cut anywhere, is known only when the weights are there.
    """
    checked_model_len(model_config, config.max_model_len)
    wants_drafter(config.speculation, has_layer=model_config.num_nextn_predict_layers > 0)
    if config.max_num_batched_tokens is not None:
        may_cut = backend_of(device).is_cut_invariant
        grid = prompt_grid(config.state_dtype, is_cut_invariant=may_cut)
        check_step_size(config.max_num_batched_tokens, max_num_seqs=config.max_num_seqs, chunk_size=grid)
    check_tiers(config.prefix_cache, config.disk_cache, config.host_cache_bytes)
    if config.disk_cache is not None:
        folder = Path(config.disk_cache.folder)
        check_size(folder, config.disk_cache.max_bytes)
        folder_fd = open_folder(folder)
        try:
            os.close(lock_folder(folder_fd, folder))
        finally:
            os.close(folder_fd)
