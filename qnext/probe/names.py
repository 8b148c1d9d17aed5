"""The names of what can be seen in a model, and patterns of them.

`layers.3.delta.query` is a part of layer 3, `mtp.router.logits` one of the MTP layer. `*` stands for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from qnext.config import LINEAR_ATTENTION, ModelConfig
from qnext.errors import UsageError

RESIDUAL_IN, RESIDUAL_MID, RESIDUAL_OUT = "residual_in", "residual_mid", "residual_out"
MIXER_IN, MIXER_OUT, FFN_IN, FFN_OUT = "mixer_in", "mixer_out", "ffn_in", "ffn_out"
DELTA_STEPS = ("conv", "query", "key", "value", "decay", "beta", "update", "state", "core_out", "gate", "gated_out")
ATTENTION_STEPS = ("query", "key", "value", "probabilities", "core_out", "gate", "gated_out")
ROUTER_STEPS = ("logits", "probabilities", "experts", "weights")
_OF_EXPERTS = (*(f"router.{step}" for step in ROUTER_STEPS), "experts.inner", "experts.out")
_OF_SHARED = ("shared.inner", "shared.out", "shared.gate")
_BEFORE_MTP = ("mtp.embedding_norm", "mtp.hidden_norm", "mtp.joined")
READ_ONLY = ("delta.update", "router.probabilities")
_INSIDE_OPS = (".delta.", ".attention.", ".experts.", ".shared.")


def is_between_ops(tap: str) -> bool:
    """Whether a tap is there when a model runs: others lie inside a fused op, and are computed once more beside it."""
    return tap.endswith(".gated_out") or not any(part in tap for part in _INSIDE_OPS)


def prefix_of(config: ModelConfig, layer_index: int) -> str:
    """How the names of a layer begin; the MTP layer comes after the last."""
    return "mtp" if layer_index == config.num_hidden_layers else f"layers.{layer_index}"


def parts_of(config: ModelConfig, layer_index: int) -> list[str]:
    """What can be seen of one layer, without the prefix, in the order in which it is computed."""
    is_mtp = layer_index == config.num_hidden_layers
    if not is_mtp and config.layer_types[layer_index] == LINEAR_ATTENTION:
        mixer = [f"delta.{step}" for step in DELTA_STEPS]
    else:
        steps = (step for step in ATTENTION_STEPS if step != "gate" or config.attention_output_gate)
        mixer = [f"attention.{step}" for step in steps]
    is_sparse = config.num_experts > 0 if is_mtp else config.is_moe_layer(layer_index)
    feed_forward: tuple[str, ...] = ("ffn.inner",)
    if is_sparse:
        feed_forward = (*_OF_EXPERTS, *(_OF_SHARED if config.shared_expert_intermediate_size else ()))
    before_ffn = (MIXER_OUT, RESIDUAL_MID, FFN_IN)
    return [RESIDUAL_IN, MIXER_IN, *mixer, *before_ffn, *feed_forward, FFN_OUT, RESIDUAL_OUT]


def tap_names(config: ModelConfig) -> list[str]:
    """All that can be seen in a model of this configuration, in the order in which it is computed."""
    count = config.num_hidden_layers
    trunk = ["embedding", *(name for layer in range(count) for name in _of_layer(config, layer)), "norm", "logits"]
    if not config.num_nextn_predict_layers:
        return trunk
    return [*trunk, *_BEFORE_MTP, *_of_layer(config, count), "mtp.norm"]


def _of_layer(config: ModelConfig, layer_index: int) -> list[str]:
    return [f"{prefix_of(config, layer_index)}.{part}" for part in parts_of(config, layer_index)]


def match(patterns: Sequence[str], config: ModelConfig) -> list[str]:
    """The names that any of the patterns fits, in the order of the model. Raises UsageError for one that fits none."""
    names = tap_names(config)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"no tap is called {pattern!r}: qnext.probe.tap_names(model.config) lists them")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
