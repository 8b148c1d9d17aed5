"""What drafts of the MTP layer bring, if so many of them are accepted: tokens of a step against the bytes it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qnext.config import ModelConfig
from qnext.planning.counts import kv_bytes_per_token
from qnext.planning.step_load import StoredSizes, mtp_bytes, read_bytes, sequence_bytes

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


class DraftedModel(NamedTuple):
    """What is stored of a model whose MTP layer drafts."""

    sizes: StoredSizes
    mtp_bytes: int
    head_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, sizes: StoredSizes, part_bytes: Mapping[str, int]) -> DraftedModel:
        """A tied head is the embedding."""
        return cls(sizes, part_bytes["mtp"], part_bytes["embedding" if config.tie_word_embeddings else "head"])


def drafts(
    config: ModelConfig, model: DraftedModel, *, context: int, batch: int, acceptance: float
) -> DraftGains | None:
    """None for a model that has no MTP layer. A draft passes the MTP layer and the head; all drafts of a step are
    verified together, for which more experts are read."""
    if not config.num_nextn_predict_layers:
        return None
    carried = batch * sequence_bytes(config, context)
    plain = read_bytes(config, model.sizes, batch) + carried
    of_draft = _draft_bytes(config, model, context, batch)
    gains = []
    for count in DRAFTS:
        tokens = sum(acceptance**depth for depth in range(count + 1))
        read = read_bytes(config, model.sizes, batch * (count + 1)) + carried + count * of_draft
        gains.append(DraftGain(count, tokens, read / plain))
    return DraftGains(acceptance, tuple(gains))


def _draft_bytes(config: ModelConfig, model: DraftedModel, context: int, batch: int) -> float:
    kv = kv_bytes_per_token(config, with_mtp=True) - kv_bytes_per_token(config)
    return mtp_bytes(config, model.mtp_bytes, batch) + model.head_bytes + batch * context * kv
