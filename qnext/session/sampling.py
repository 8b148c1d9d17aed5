"""The sampling that a model folder recommends in generation_config.json. What a caller asks for counts first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnext.errors import CorruptCheckpoint, UsageError

if TYPE_CHECKING:
    from qnext.engine import SamplingParams

# Keys of generation_config.json that carry over; each is named like the field of SamplingParams.
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_CONFIG_KEYS = ("temperature", "top_k", "top_p", "min_p", *_PENALTIES)


def resolve_sampling(folder: Path, asked: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters: the values of `asked` that are not None, then generation_config.json, then greedy.

    A file without a temperature means temperature 1 when it says do_sample true. do_sample false means greedy.
    """
    from qnext.engine import SamplingParams

    values = sampling_defaults(folder)
    return SamplingParams(**values | {key: value for key, value in asked.items() if value is not None})


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """The sampling in generation_config.json. Raises CorruptCheckpoint for impossible values."""
    from qnext.engine import SamplingParams
    from qnext.text.files import read_json_object

    path = folder / "generation_config.json"
    config = read_json_object(path)
    values = {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None}
    if config.get("do_sample") is True:
        values.setdefault("temperature", 1.0)
    elif config.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values)
    except UsageError as error:
        raise CorruptCheckpoint(f"{path}: {error}") from None
    return values
