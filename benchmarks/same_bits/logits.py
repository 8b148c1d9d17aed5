"""Digests of logits and gradients of bare models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from same_bits.digests import bytes_digest, file_digest
from same_bits.house import command_line, find, set_num_threads

NUM_TOKENS = 150


def logits_digests(index: int, folders: dict[str, Path], vocab_size: int, work: Path) -> dict[str, Any]:
    """Of `qnext logits`, in one pass and in chunks through a cache, in every form, with one thread and with two."""
    rng = random.Random(f"tokens {index}")
    tokens = ",".join(str(rng.randrange(vocab_size)) for _ in range(NUM_TOKENS))
    digests: dict[str, Any] = {}
    for form, folder in folders.items():
        for chunk in (None, rng.choice((1, 7, 63, 64, 100))):
            for num_threads in (1, 2) if chunk is None else (1,):
                set_num_threads(num_threads)
                out = work / "logits.npy"
                options = [] if chunk is None else ["--chunk", chunk]
                if form != "int4-g32":
                    options += ["--dtype", form]
                command_line("logits", folder, "--tokens", tokens, "--out", out, *options)
                key = f"{form}, {'whole' if chunk is None else f'chunks of {chunk}'}, threads {num_threads}"
                digests[key] = file_digest(out)
                out.unlink()
    set_num_threads(1)
    return digests


def gradient_digests(index: int, folder: Path) -> dict[str, str]:
    """Of every parameter, for a loss of trunk and MTP layer on packed sequences."""
    import torch

    batch_type = find("Batch", "qnext.model")
    model = find("load_model", "qnext.checkpoint")(folder, dtype=torch.float32).train().requires_grad_(True)
    lengths = [63, 1, 66]
    generator = torch.Generator().manual_seed(index)
    tokens_T = torch.randint(model.config.vocab_size, (sum(lengths),), generator=generator)
    labels_T = torch.randint(model.config.vocab_size, (sum(lengths),), generator=generator)
    batch = batch_type.from_lengths(tokens_T, lengths)
    trunk = model(batch)
    loss = torch.nn.functional.cross_entropy(model.logits(trunk.hidden_TD), labels_T)
    if model.mtp is not None:
        hidden_TD = model.draft_hidden(labels_T, trunk, batch)
        loss = loss + torch.nn.functional.cross_entropy(model.logits(hidden_TD), labels_T.flip(0))
    loss.backward()
    digests = {"loss": loss.item().hex()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        digests[name] = "none" if gradient is None else bytes_digest(gradient.contiguous().numpy().tobytes())
    return digests
