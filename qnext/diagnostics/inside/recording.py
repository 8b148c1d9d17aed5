"""One model on some tokens: what its taps show, and checksums of its weights. Kept while another model is loaded.

Legend: T tokens, Y vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from qnext import ops
from qnext.model import Batch, CausalLM, named_tensors
from qnext.probe import ModelProbe, tap_names

_LARGE = (".state", ".update", ".probabilities", ".experts.inner", ".experts.out")  # no part needs them to be found


@dataclass(frozen=True)
class StoredTensor:
    """Of a model in memory. Two with equal checksums have the same bytes, except by chance (1 in four billion)."""

    shape: tuple[int, ...]
    dtype: str
    checksum: int


@dataclass(frozen=True)
class RecordedPass:
    """`taps` are in the order of the model, [T, ...] each; the last are the logits [T, Y]."""

    taps: dict[str, Tensor]
    weights: dict[str, StoredTensor]

    def to_bytes(self) -> bytes:
        """As safetensors, with the weights' checksums beside them."""
        weights = json.dumps({name: asdict(weight) for name, weight in self.weights.items()})
        order = json.dumps(list(self.taps))
        return save({name: x.contiguous() for name, x in self.taps.items()}, {"weights": weights, "order": order})

    @staticmethod
    def from_bytes(data: bytes) -> RecordedPass:
        length = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + length])["__metadata__"]
        taps = load(data)
        weights = {
            name: StoredTensor(tuple(each["shape"]), each["dtype"], each["checksum"])
            for name, each in json.loads(told["weights"]).items()
        }
        return RecordedPass({name: taps[name] for name in json.loads(told["order"])}, weights)


@torch.inference_mode()
def record_pass(model: CausalLM, token_ids: Sequence[int]) -> RecordedPass:
    """All tokens in one pass without a cache."""
    token_ids_T = torch.tensor(list(token_ids), dtype=torch.long, device=model.device)
    names = [name for name in tap_names(model.config) if not name.startswith("mtp.") and not name.endswith(_LARGE)]
    with ModelProbe(model, names) as probe:
        model.logits(model(Batch.from_lengths(token_ids_T, [len(token_ids_T)])).hidden_TD)
    seen = {name: probe.captures.values(name) for name in probe.captures.names()}
    weights = {name: _stored(tensor) for name, tensor in named_tensors(model)}
    return RecordedPass({name: seen[name] for name in names}, weights)


def _stored(tensor: Tensor) -> StoredTensor:
    raw_B = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), ops.crc32(raw_B))
