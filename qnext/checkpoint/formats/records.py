"""The block of folders whose experts are records: which layers, and what the bytes are. No torch.

The method is qnext's own, so that other programs refuse such a folder instead of missing its experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qnext.checkpoint.formats.block import ConfigBlock
from qnext.checkpoint.formats.forms import Form, Quantization, RecordForms, Rule
from qnext.planning.expert_records import CODE_BITS, FLOAT_BYTES, MatrixForm

METHOD = "expert-records"
VERSION = 1
REST = "rest"  # the key of what is said of all that is no expert
_MAX_LAYERS = 1 << 16


class _ExpertsOf:
    """The modules of experts in these layers, or those of one kind."""

    def __init__(self, layers: frozenset[str], *, is_down: bool) -> None:
        self._layers = layers
        self._is_down = is_down

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str)
        layer, _, expert = name.rpartition(".mlp.experts.")
        return layer in self._layers and expert.endswith(".down_proj") == self._is_down


def read_records(block: ConfigBlock) -> Quantization:
    """Rules and forms of the experts; what is said of the rest the caller reads."""
    block.neutral("quant_method", REST)
    block.choice("version", (VERSION,))
    groups = block.get("groups")
    if not isinstance(groups, list) or not groups:
        raise block.error("groups", "must be a list of objects")
    rules: list[Rule] = []
    records: dict[str, RecordForms] = {}
    for number, values in enumerate(groups):
        group = block.inner(values, f"groups[{number}]")
        forms = RecordForms(_read_form(group.block("gate_up")), _read_form(group.block("down")))
        layers = group.names("layers")
        if not layers or len(layers) > _MAX_LAYERS or records.keys() & set(layers) or len(set(layers)) < len(layers):
            raise group.error("layers", "must name layers, each once")
        records |= dict.fromkeys(layers, forms)
        for form, is_down in ((forms.gate_up, False), (forms.down, True)):
            rules.append(Rule(panel_form(form), _ExpertsOf(frozenset(layers), is_down=is_down)))
    return Quantization(METHOD, tuple(rules), block.where, records)


def _read_form(block: ConfigBlock) -> MatrixForm:
    dtype = block.choice("dtype", (*CODE_BITS, *FLOAT_BYTES))
    if dtype in FLOAT_BYTES:
        block.neutral("group_size", "scale_dtype", "has_zeros")
        return MatrixForm(dtype)
    scale_dtype = block.choice("scale_dtype", tuple(FLOAT_BYTES))
    try:
        return MatrixForm(
            dtype, block.group_size("group_size") or 0, scale_dtype, block.flag("has_zeros", False) is True
        )
    except ValueError as error:
        raise block.error("group_size", str(error)) from None


def panel_form(form: MatrixForm) -> Form | None:
    """How the matrices of records lie there; None for plain numbers."""
    return None if form.is_float else Form("panels", form.bits, form.group_size, not form.has_zeros)


def records_config(records: Mapping[str, RecordForms], *, rest: Mapping[str, Any] | None) -> dict[str, Any]:
    """The block of a folder with these records, by name of the layer; `rest` is the block of all else, if any."""
    groups: dict[RecordForms, list[str]] = {}
    for layer, forms in records.items():
        groups.setdefault(forms, []).append(layer)
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "groups": [
            {"gate_up": _written(forms.gate_up), "down": _written(forms.down), "layers": layers}
            for forms, layers in groups.items()
        ],
        REST: None if rest is None else dict(rest),
    }


def _written(form: MatrixForm) -> dict[str, Any]:
    if form.is_float:
        return {"dtype": form.dtype}
    return {
        "dtype": form.dtype,
        "group_size": form.group_size,
        "scale_dtype": form.scale_dtype,
        "has_zeros": form.has_zeros,
    }
