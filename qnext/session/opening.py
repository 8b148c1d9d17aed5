"""A folder to an engine: in this process, or on several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.session.folder import EngineOpening, ModelFolder, load_weights, place_model

if TYPE_CHECKING:
    from qnext.engine import Engine, EngineConfig
    from qnext.model import CausalLM


def open_engine(folder: ModelFolder, config: EngineConfig, how: EngineOpening) -> tuple[CausalLM, Engine]:
    """The model, on ranks that of the first one, and its engine, which is to be closed. Options are checked before
    weights are read. Raises the errors of load_weights and Engine.of, and LostRank."""
    from qnext.engine import Engine, check_options

    check_options(folder.config, config, place_model(folder, how.dtype, how.ranks))
    if how.ranks.num_ranks == 1:
        model = load_weights(folder, how.dtype, progress=how.progress)
        return model, Engine.of(model, config)
    from qnext.session.ranks import open_on_ranks

    return open_on_ranks(folder, config, how)
