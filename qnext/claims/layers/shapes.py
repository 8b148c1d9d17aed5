"""Which layers are timed: one of each kind of both released models, their heads, and the frame around a layer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from qnext.checkpoint import create_folder
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, preset
from qnext.files import scratch_folder
from qnext.quant.scheme import make_policy
from qnext.text.train import byte_level_tokenizer, save_tokenizer

HEAD_ROWS = 16384  # of the heads that are timed: a head's time grows with its rows
_ROWS, _POSITIONS = 1024, 1 << 21


class Compared(NamedTuple):
    """A hybrid model and the dense one that it is compared with."""

    name: str
    hybrid: ModelConfig
    dense: ModelConfig
    head_rows: int = HEAD_ROWS

    @property
    def layer_counts(self) -> tuple[int, int, int]:
        """Linear and full layers of the hybrid model, and layers of the dense one."""
        return self.hybrid.num_linear_layers, self.hybrid.num_full_layers, self.dense.num_hidden_layers

    def shape(self, kind: str) -> ModelConfig:
        """A model of one layer behind a small vocabulary. The full layer of the hybrid model has few experts here: it
        borrows those of the linear one, which have the same shape."""
        side = self.dense if kind.startswith("dense") else self.hybrid
        if kind == DENSE_PAIR:
            return _bare(side, layer_types=(FULL_ATTENTION,) * 2)
        if kind in ("linear", "dense"):
            return _bare(side, layer_types=(LINEAR_ATTENTION if kind == "linear" else FULL_ATTENTION,))
        if kind == "full":
            return _bare(side, layer_types=(FULL_ATTENTION,), num_experts=16)
        return _frame(side, self.head_rows if kind.endswith("head") else _ROWS)


LAYERS = ("linear", "full", "dense")
DENSE_PAIR = "dense pair"  # two layers, for a program that computes less of the last one
KINDS = (*LAYERS, "frame", "dense frame", "head", "dense head")
HYBRID_KINDS = ("linear", "full", "frame", "head")
RELEASED = Compared("released", preset("80b-a3b"), preset("qwen3-32b"))


def tiny() -> Compared:
    """For the form of seconds: it shows that all of it runs."""
    hybrid = preset("nano-5m")
    dense = {"layer_types": (FULL_ATTENTION,) * 6, "num_experts": 0, "intermediate_size": 512}
    changes = {"num_nextn_predict_layers": 0, "attention_output_gate": False, "tie_word_embeddings": False}
    return Compared("tiny", hybrid.with_(tie_word_embeddings=False), hybrid.with_(**dense, **changes), head_rows=2048)


def _bare(config: ModelConfig, **changes: object) -> ModelConfig:
    small = {"vocab_size": _ROWS, "max_position_embeddings": _POSITIONS, "num_nextn_predict_layers": 0}
    ids = {"bos_token_id": None, "eos_token_id": None}
    return config.with_layers(1).with_(**{**small, **ids, **changes})


def _frame(config: ModelConfig, rows: int) -> ModelConfig:
    """What is around a layer: the embedding, the final norm, a head of so many rows. Its own layer does next to
    nothing."""
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "partial_rotary_factor": 1.0}
    dense = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "intermediate_size": 32}
    kinds = {"layer_types": (FULL_ATTENTION,), "shared_expert_intermediate_size": 0, "vocab_size": rows}
    return _bare(config, **sizes, **dense, **kinds)


def layer_folder(place: Path, of: Compared, kind: str, scheme: str) -> Path:
    """The folder of a shape with random weights, made where it is not there. `scheme` is bf16 or one of quant."""
    folder = place / "layers" / of.name / f"{kind.replace(' ', '-')}-{scheme}"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = of.shape(kind)
    policy = None if scheme == "bf16" else make_policy(scheme, head=None, is_tied=False)
    with scratch_folder() as tokenizer:
        save_tokenizer(byte_level_tokenizer(), tokenizer, model_max_length=_POSITIONS)
        create_folder(config, folder, seed=0, dtype=torch.bfloat16, policy=policy, tokenizer_folder=tokenizer)
    return folder
