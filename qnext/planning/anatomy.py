"""What a model is, whatever it runs on: parameters, bytes and work of each part, and what a sequence carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, NamedTuple

from qnext.config import ModelConfig
from qnext.planning.counts import (
    ActiveCounts,
    ParameterCounts,
    StateBytes,
    count_active,
    count_parameters,
    distinct_experts,
    kv_bytes_per_token,
    state_bytes_per_sequence,
)
from qnext.planning.flops import ForwardFlops, prefill_flops, token_flops, training_flops
from qnext.planning.parameters import ParameterInfo, list_parameters
from qnext.planning.plan import CHECKPOINT_INTERVAL

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KV_DTYPES = ("bfloat16", "float8_e4m3fn", "int8")
STATE_DTYPES = ("float32", "bfloat16")
# A row of the table: its parameters, and its operations. Cores multiply no weights.
_ROWS = (
    ("embedding", "embedding", None),
    ("attention projections", "attention", "attention_projections"),
    ("attention core", None, "attention_core"),
    ("delta projections", "delta_net", "delta_projections"),
    ("delta core", None, "delta_core"),
    ("router", "router", "router"),
    ("experts", "experts", "experts"),
    ("shared experts", "shared_experts", "shared_experts"),
    ("dense MLP", "dense_mlp", "dense_mlp"),
    ("norms", "norms", None),
    ("head", "head", "head"),
    ("MTP", "mtp", "mtp"),
)


class PartFigures(NamedTuple):
    """A part of a model: numbers, bytes, and operations of a token in decoding, in a prompt and in training."""

    name: str
    parameters: int
    num_bytes: int
    decode: float
    prompt: float
    training: float


@dataclass(frozen=True)
class Anatomy:
    """Of a model at one context length. `decode` is of a token behind it, `prompt` of all its tokens, `training` of a
    token in sequences of this length, forward and backward. `distinct` has how many experts of a layer a step of so
    many sequences touches where each chooses evenly."""

    context: int
    parameters: ParameterCounts
    active: ActiveCounts
    part_bytes: Mapping[str, int]
    decode: ForwardFlops
    prompt: ForwardFlops
    training: ForwardFlops
    kv_per_token: Mapping[str, int]
    states: Mapping[str, StateBytes]
    distinct: Mapping[int, float]

    def parts(self) -> list[PartFigures]:
        """Those that the model has."""
        found = []
        for name, counted, computed in _ROWS:
            work = [0.0 if computed is None else getattr(flops, computed) for flops in self._flops]
            numbers = 0 if counted is None else getattr(self.parameters, counted)
            row = PartFigures(name, numbers, 0 if counted is None else self.part_bytes.get(counted, 0), *work)
            if any(row[1:]):
                found.append(row)
        return found

    @property
    def _flops(self) -> tuple[ForwardFlops, ForwardFlops, ForwardFlops]:
        return self.decode, self.prompt.times(1 / self.context), self.training

    @property
    def snapshot_tokens(self) -> float:
        """Tokens whose keys and values take as much as the states of one cached prefix."""
        kv = self.kv_per_token["bfloat16"]
        return self.states["float32"].total / kv if kv else 0.0

    @property
    def prefix_bytes(self) -> int:
        """Of the states that the prefix cache keeps of one prompt of this context, beside its keys and values."""
        return -(-self.context // CHECKPOINT_INTERVAL) * self.states["float32"].total

    def document(self) -> dict[str, Any]:
        """For programs."""
        flops = {"decode": self.decode, "prompt": self.prompt, "training": self.training}
        return {
            "parameters": {
                **asdict(self.parameters),
                "total": self.parameters.total,
                "trunk": self.parameters.trunk,
                "active_without_head": self.active.without_head,
                "active_with_head": self.active.with_head,
            },
            "part_bytes": dict(self.part_bytes),
            "flops": {name: {**asdict(each), "total": each.total} for name, each in flops.items()},
            "kv_bytes_per_token": dict(self.kv_per_token),
            "state_bytes_per_sequence": {
                name: {**asdict(each), "total": each.total} for name, each in self.states.items()
            },
            "distinct_experts": {str(batch): count for batch, count in self.distinct.items()},
            "prefix_cache": {
                "checkpoint_interval": CHECKPOINT_INTERVAL,
                "checkpoint_bytes": self.states["float32"].total,
                "checkpoint_in_tokens": self.snapshot_tokens,
                "checkpoints_of_prompt_bytes": self.prefix_bytes,
            },
        }


def anatomy(config: ModelConfig, part_bytes: Mapping[str, int], *, context: int) -> Anatomy:
    """`part_bytes` are of each field of ParameterCounts, as they lie on disk."""
    batches = BATCHES if config.num_experts else ()
    return Anatomy(
        context,
        count_parameters(config),
        count_active(config),
        part_bytes,
        token_flops(config, context=context),
        prefill_flops(config, context),
        training_flops(config, sequence_length=context),
        {dtype: kv_bytes_per_token(config, dtype=dtype) for dtype in KV_DTYPES},
        {dtype: state_bytes_per_sequence(config, state_dtype=dtype) for dtype in STATE_DTYPES},
        {batch: distinct_experts(config.num_experts, config.num_experts_per_tok, batch) for batch in batches},
    )


def part_bytes(config: ModelConfig, bits_of: Callable[[ParameterInfo], float]) -> dict[str, int]:
    """Bytes of each field of ParameterCounts where a number of a parameter takes so many bits, scales among them."""
    found = dict.fromkeys((field.name for field in fields(ParameterCounts)), 0)
    for info in list_parameters(config).values():
        found[info.part] += round(prod(info.shape) * bits_of(info) / 8)
    return found
