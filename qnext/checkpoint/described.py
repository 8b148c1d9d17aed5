"""The quantization_config of a folder that is written, from the form of each weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qnext.checkpoint.formats.records import records_config
from qnext.checkpoint.record_output import RecordWriter, WeightForm
from qnext.config import ModelConfig
from qnext.planning import Kind
from qnext.planning.expert_records import MatrixForm
from qnext.quant.formats import PackedGroup, compressed_tensors_config

_EXPERT = re.compile(r"(.+\.experts\.)\d+(\..+)")


def describe(
    forms: Iterable[WeightForm], *, config: ModelConfig, records: RecordWriter | None
) -> dict[str, Any] | None:
    """How compressed-tensors describes these weights, around it what is said of `records`; None for plain numbers.

    The commonest form is that of every linear layer, others go by names. `ignore` holds exact names of modules, as the
    tensors are called on disk: readers that fuse modules look up each part. The embedding is no Linear and need not be
    named, nor need what is a record.
    """
    coded: dict[str, MatrixForm] = {}
    kept: list[str] = []
    for parameter, part, form in forms:
        if records is not None and records.takes(part):
            continue
        if not form.is_float:
            coded[part.module] = MatrixForm(form.dtype, form.group_size, "float32", form.has_zeros)
        elif len(part.shape) > 1 and parameter.kind is not Kind.EMBEDDING:
            kept.append(part.module)
    if config.tie_word_embeddings:
        kept.append("lm_head")
    packed = None
    if coded:
        groups = [
            PackedGroup(form.bits, form.group_size, ["Linear"] if i == 0 else _targets(coded, form), not form.has_zeros)
            for i, (form, _) in enumerate(Counter(coded.values()).most_common())
        ]
        packed = compressed_tensors_config(groups, ignore=kept)
    return packed if records is None else records_config(records.forms, rest=packed)


def _targets(coded: Mapping[str, MatrixForm], form: MatrixForm) -> list[str]:
    """Names of the modules of a form, the experts of a layer as one pattern where all of them have it."""
    patterns = {module: _pattern(module) for module in coded}
    others = {patterns[module] for module, each in coded.items() if each != form}
    own = [module for module, each in coded.items() if each == form]
    return list(dict.fromkeys(module if patterns[module] in others else patterns[module] for module in own))


def _pattern(module: str) -> str:
    match = _EXPERT.fullmatch(module)
    return module if match is None else f"re:{re.escape(match[1])}\\d+{re.escape(match[2])}$"
