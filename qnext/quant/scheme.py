"""Which tensor is stored in how many bits. No torch.

Matrices that every token multiplies, and the experts, are quantised. What decides (router, gates, decay), what is
small (norms, convolution) and the embedding, of which a token reads one row, keep their dtype, and so does mtp.fc, as
in the official FP8 checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qnext.errors import UsageError, did_you_mean

# Module names, relative to a layer or whole, of the matrices that are quantised; norms and vectors are none.
_QUANTIZED = re.compile(
    r"(model|mtp)\.layers\.\d+\."
    r"(linear_attn\.(in_proj_qkvz|out_proj)"
    r"|self_attn\.[qkvo]_proj"
    r"|mlp\.((experts\.\d+|shared_expert)\.)?(gate|up|down)_proj)\.weight"
)
HEAD = "lm_head.weight"
HEAD_CHOICES = ("keep", "int8", "int4")


@dataclass(frozen=True)
class QuantScheme:
    """Symmetric integer codes of `bits` bits with a scale for every `group_size` inputs of an output."""

    name: str
    bits: int
    group_size: int


# Groups of 32 for plain int8: they divide the inner sizes of small models too, and cost half a bit a weight.
SCHEMES = {
    name: QuantScheme(name, bits, group_size)
    for name, bits, group_size in (
        ("int4-g32", 4, 32), ("int4-g64", 4, 64), ("int4-g128", 4, 128),
        ("int8", 8, 32), ("int8-g32", 8, 32), ("int8-g64", 8, 64), ("int8-g128", 8, 128),
    )
}  # fmt: skip


def find_scheme(name: str) -> QuantScheme:
    """The scheme called `name`; UsageError lists the known names."""
    if name not in SCHEMES:
        raise UsageError(f"no scheme {name!r}; known: {', '.join(SCHEMES)}{did_you_mean(name, SCHEMES)}")
    return SCHEMES[name]


@dataclass(frozen=True)
class QuantPolicy:
    """A scheme for the layers, and one for the head or None to keep it."""

    scheme: QuantScheme
    head: QuantScheme | None

    def scheme_of(self, name: str, shape: tuple[int, ...]) -> QuantScheme | None:
        """The scheme of a tensor on disk, or None where it keeps its dtype.

        A matrix whose inputs are no whole number of groups is kept: padding would make the scales of the last group
        describe inputs that do not exist, and readers disagree on it.
        """
        in_layer = self.scheme if _QUANTIZED.fullmatch(name) else None
        scheme = self.head if name == HEAD else in_layer
        return scheme if scheme is not None and len(shape) == 2 and shape[1] % scheme.group_size == 0 else None


def make_policy(scheme_name: str, *, head: str | None, is_tied: bool) -> QuantPolicy:
    """`head` is one of HEAD_CHOICES; None means int8, or keep where head and embedding are one tensor.

    Raises UsageError for an unknown word, and for a tied head that is to be quantised: the embedding stays as it is.
    """
    scheme = find_scheme(scheme_name)
    if head is not None and head not in HEAD_CHOICES:
        raise UsageError(f"head {head!r}: must be one of {', '.join(HEAD_CHOICES)}")
    if is_tied and head in ("int8", "int4"):
        raise UsageError(f"head {head}: this model has no head of its own, it multiplies by the embedding; use keep")
    if head == "keep" or is_tied:
        return QuantPolicy(scheme, None)
    return QuantPolicy(scheme, find_scheme(f"{head or 'int8'}-g{scheme.group_size}"))
