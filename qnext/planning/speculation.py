"""What drafts of the MTP layer bring, if so many of them are accepted: tokens of a step against the bytes it reads."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from qnext.config import ModelConfig
from qnext.planning.counts import distinct_experts, kv_bytes_per_token, state_bytes_per_sequence
from qnext.planning.parameters import list_parameters

# Of a first draft, where nothing is given: 0.647 pooled over texts of a successor with the same module (Qwen3.8-27B;
# code 0.908, prose 0.49), and far less behind long contexts. An assumption; `qnext eval` measures a model's own.
ASSUMED_ACCEPTANCE = 0.65
DRAFTS = (1, 2, 3)


class DraftGain(NamedTuple):
    """Of so many drafts in a step: tokens that it yields on average, what it reads over a step without drafts, and how
    many times as fast decoding is where bytes decide."""

    num_drafts: int
    tokens: float
    read_ratio: float

    @property
    def speedup(self) -> float:
        return self.tokens / self.read_ratio


class DraftGains(NamedTuple):
    """`acceptance` is assumed for each draft, given that those before it were accepted."""

    acceptance: float
    gains: tuple[DraftGain, ...]

    def document(self) -> dict[str, Any]:
        """For programs."""
        gains = [{**each._asdict(), "speedup": each.speedup} for each in self.gains]
        return {"assumed_acceptance": self.acceptance, "gains": gains}


def read_bytes(config: ModelConfig, part_bytes: Mapping[str, int], num_tokens: int) -> float:
    """Of the weights that a step of so many tokens reads: of the trunk and the head, and experts that are used once."""
    head = part_bytes["embedding"] if config.tie_word_embeddings else part_bytes["head"]
    skipped = ("embedding", "head", "experts", "mtp")
    dense = sum(count for part, count in part_bytes.items() if part not in skipped) + head
    if not config.num_experts:
        return dense
    touched = distinct_experts(config.num_experts, config.num_experts_per_tok, num_tokens)
    return dense + part_bytes.get("experts", 0) * touched / config.num_experts


def sequence_bytes(config: ModelConfig, context: int) -> int:
    """That a step reads and writes of one sequence: keys and values read, states read and written."""
    return context * kv_bytes_per_token(config) + 2 * state_bytes_per_sequence(config).total


def drafts(
    config: ModelConfig, part_bytes: Mapping[str, int], *, context: int, batch: int, acceptance: float
) -> DraftGains | None:
    """None for a model that has no MTP layer. A draft passes the MTP layer and the head; all drafts of a step are
    verified together, for which more experts are read."""
    if not config.num_nextn_predict_layers:
        return None
    carried = batch * sequence_bytes(config, context)
    plain = read_bytes(config, part_bytes, batch) + carried
    of_draft = _draft_bytes(config, part_bytes, context, batch)
    gains = []
    for count in DRAFTS:
        tokens = sum(acceptance**depth for depth in range(count + 1))
        read = read_bytes(config, part_bytes, batch * (count + 1)) + carried + count * of_draft
        gains.append(DraftGain(count, tokens, read / plain))
    return DraftGains(acceptance, tuple(gains))


def _draft_bytes(config: ModelConfig, part_bytes: Mapping[str, int], context: int, batch: int) -> float:
    infos = [info for info in list_parameters(config).values() if info.part == "mtp"]
    everything = sum(prod(info.shape) for info in infos)
    routed = sum(prod(info.shape) for info in infos if info.expert_axis is not None)
    touched = distinct_experts(config.num_experts, config.num_experts_per_tok, batch)
    used = everything - routed + (routed * touched / config.num_experts if config.num_experts else 0)
    head = part_bytes["embedding"] if config.tie_word_embeddings else part_bytes["head"]
    kv = kv_bytes_per_token(config, with_mtp=True) - kv_bytes_per_token(config)
    return part_bytes["mtp"] * used / everything + head + batch * context * kv
