"""Which tensor is stored in how many bits. No torch.

Matrices that every token multiplies, and the experts, are quantised. These keep their dtype: tensors that decide
(router, gates, decay), small tensors (norms, convolution), the embedding, of which a token reads one row, and mtp.fc,
as in the official FP8 checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from qnext.errors import UsageError, did_you_mean
from qnext.planning import Kind, ParameterInfo
from qnext.planning.parameters import QUANTIZED

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
        ("int4-g32", 4, 32),
        ("int4-g64", 4, 64),
        ("int4-g128", 4, 128),
        ("int8", 8, 32),
        ("int8-g32", 8, 32),
        ("int8-g64", 8, 64),
        ("int8-g128", 8, 128),
    )
}


def find_scheme(name: str) -> QuantScheme:
    """The scheme called `name`; UsageError lists the known names."""
    if name not in SCHEMES:
        raise UsageError(f"no scheme {name!r}; known: {', '.join(SCHEMES)}{did_you_mean(name, SCHEMES)}")
    return SCHEMES[name]


@dataclass(frozen=True)
class QuantPolicy:
    """One scheme for the layers, and one for the head; None keeps the head's dtype."""

    scheme: QuantScheme
    head: QuantScheme | None

    def scheme_of(self, info: ParameterInfo) -> QuantScheme | None:
        """The scheme of a parameter, the same for all experts, or None where the parameter keeps its dtype.

        A matrix keeps its dtype where its inputs are no whole number of groups. With padding, the scales of the last
        group would describe inputs that do not exist, and readers disagree on them.
        """
        in_layer = self.scheme if info.kind in QUANTIZED else None
        scheme = self.head if info.kind is Kind.HEAD else in_layer
        return scheme if scheme is not None and info.shape[-1] % scheme.group_size == 0 else None


def make_policy(scheme_name: str, *, head: str | None, is_tied: bool) -> QuantPolicy:
    """`head` is one of HEAD_CHOICES. None means int8, or keep where head and embedding are one tensor.

    Raises UsageError for an unknown word, and for a tied head that is to be quantised, because the embedding keeps its
    dtype.
    """
    scheme = find_scheme(scheme_name)
    if head is not None and head not in HEAD_CHOICES:
        raise UsageError(f"head {head!r}: must be one of {', '.join(HEAD_CHOICES)}")
    if is_tied and head in ("int8", "int4"):
        raise UsageError(f"head {head}: this model has no head of its own, it multiplies by the embedding; use keep")
    if head == "keep" or is_tied:
        return QuantPolicy(scheme, None)
    return QuantPolicy(scheme, find_scheme(f"{head or 'int8'}-g{scheme.group_size}"))
