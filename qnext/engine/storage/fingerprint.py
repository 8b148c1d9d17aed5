"""One value for all that a stored prefix depends on besides its tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from qnext.engine.execution.cache import Cache
from qnext.engine.execution.transfer import pages_of, states_of
from qnext.engine.storage.disk_entry import make_fingerprint
from qnext.model import CausalLM, named_tensors, named_weights
from qnext.ops import RecordWeight, arithmetic_of
from qnext.version import __version__

LAYOUT = 1  # of entries: raise it when what they hold, or what it means, changes
_NUM_SAMPLES = 1024
_SAMPLE_BYTES = 64


def fingerprint(model: CausalLM, cache: Cache, **facts: str | int) -> bytes:
    """Of model, arithmetic and cache layout. `facts` are the caller's own. Costs tenths of a second for large models.

    The layout is the name, type and shape of every tensor of a block and of a slot: block size, type of keys, values
    and states, which layers there are. The arithmetic is the package's version, the device, and the instruction set of
    the native kernels or torch's version.
    """
    layout = [
        (name, str(tensor.dtype), *tensor.shape[1:])
        for tensors in (pages_of(cache), states_of(cache))
        for name, tensor in tensors.items()
    ]
    facts = {"arithmetic": arithmetic_of(model.device), "layout": json.dumps([LAYOUT, layout]), **facts}
    return make_fingerprint(weights_digest(model), version=__version__, **facts)


def weights_digest(model: CausalLM, *, whole: Callable[[Tensor], Tensor] | None = None) -> bytes:
    """Of the config, and of name, type, shape and a sample of the bytes of every parameter, buffer and packed weight.

    The sample is everything up to 64 KiB, else 1,024 pieces of 64 bytes evenly over the tensor and its end: training
    changes every matrix nearly everywhere, so other weights differ in some piece of some tensor. Whoever edits single
    numbers of a matrix by hand is not noticed, and neither is a change after the engine was made. `whole` gives all of
    a tensor of which a part is here.
    """
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(asdict(model.config), sort_keys=True, default=str).encode())
    for name, here in _told_tensors(model):
        tensor = here if whole is None else whole(here)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_sample(tensor))
    return digest.digest()


def _told_tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """What tells the content of every weight: its tensors, or the checksums of records, wherever they lie."""
    stamps = {
        name: weight.records.stamps
        for name, weight in named_weights(model)
        if isinstance(weight, RecordWeight) and weight.records.stamps is not None
    }
    for name, tensor in named_tensors(model):
        if name.rpartition(".")[0] not in stamps:
            yield name, tensor
    yield from stamps.items()


def _sample(tensor: Tensor) -> bytes:
    bytes_N = tensor.detach().contiguous().view(-1).view(torch.uint8)
    count = bytes_N.numel()
    if count > _NUM_SAMPLES * _SAMPLE_BYTES:
        stride = count // _NUM_SAMPLES
        pieces = bytes_N[: stride * _NUM_SAMPLES].view(_NUM_SAMPLES, stride)[:, :_SAMPLE_BYTES]
        bytes_N = torch.cat([pieces.reshape(-1), bytes_N[-_SAMPLE_BYTES:]])
    return bytes_N.cpu().numpy().tobytes()
