"""The tensors that a packed weight consists of, checked from headers alone. No torch.

Legend: F outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.quantization import Form, Quantization

SCALE_DTYPES = ("BF16", "F16", "F32")
# Names after the module's that only packed weights have.
_MARKS = {
    "pack-quantized": "weight_packed", "int-quantized": "weight_scale", "awq": "qweight", "gptq": "qweight",
    "gptq_v2": "qweight",
}  # fmt: skip
_ALL_MARKS = tuple(dict.fromkeys(_MARKS.values()))


class Stored(NamedTuple):
    """One tensor of a packed weight as it must lie on disk."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class PackedWeight(NamedTuple):
    """A weight [F, D] that lies packed; `stored` by what the tensor holds: codes, scales, zeros, shape, index."""

    shape: tuple[int, int]
    form: Form
    stored: dict[str, Stored]

    @property
    def group_size(self) -> int:
        return self.form.group_size or self.shape[1]


class PackedWeights(NamedTuple):
    """What the tensors say where config.json declares a quantisation, and what contradicts it, one line each."""

    weights: dict[str, PackedWeight]  # by name of the weight
    problems: list[str]
    disputed: frozenset[str]  # names of weights that a line of `problems` is about


NOTHING_PACKED = PackedWeights({}, [], frozenset())


def find_packed(
    quantization: Quantization | None, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> PackedWeights:
    """Which of the weights `shapes` (by name on disk) are packed. The tensors decide; config.json must agree."""
    if quantization is not None and quantization.is_fp8:
        return NOTHING_PACKED
    found = PackedWeights({}, [], frozenset())
    disputed: set[str] = set()
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        marks = [mark for mark in _ALL_MARKS if f"{module}.{mark}" in tensors]
        if quantization is None and not marks:
            continue
        problem = None
        if quantization is None:
            problem = f"{tensors[f'{module}.{marks[0]}'].file}: tensor {module}.{marks[0]} is part of a packed weight, "
            problem += "but config.json has no quantization_config"
        elif len(shape) == 2 and name.endswith(".weight") and not name.endswith("embed_tokens.weight"):
            form, problem = _form_of(quantization, module, marks, tensors)
            if form is not None:
                matrix = (shape[0], shape[1])
                problem = _size_problem(tensors[f"{module}.{_MARKS[form.layout]}"], matrix, form)
                found.weights[name] = PackedWeight(matrix, form, _stored(module, matrix, form, tensors))
        elif marks:
            problem = f"{tensors[f'{module}.{marks[0]}'].file}: tensor {module}.{marks[0]}: {module} cannot be packed"
        if problem is not None:
            found.problems.append(problem)
            disputed.add(name)
            found.weights.pop(name, None)
    return found._replace(disputed=frozenset(disputed))


def _form_of(
    quantization: Quantization, module: str, marks: list[str], tensors: Mapping[str, TensorInfo]
) -> tuple[Form | None, str | None]:
    """The form of a weight that is packed, and what is wrong."""
    claim = quantization.claim(module)
    plain = tensors.get(f"{module}.weight")
    if claim.form is None:
        if marks:
            info = tensors[f"{module}.{marks[0]}"]
            return None, f"{info.file}: tensor {info.name}: quantization_config leaves {module} as it is"
        return None, None
    mark = _MARKS[claim.form.layout]
    if mark in marks:
        if plain is not None and claim.form.layout != "int-quantized":
            return None, f"{plain.file}: tensor {plain.name} is there beside {module}.{mark}"
        return claim.form, None
    if marks:
        info = tensors[f"{module}.{marks[0]}"]
        return None, f"{info.file}: tensor {info.name}: quantization_config asks for {module}.{mark}"
    if plain is not None and claim.is_certain:
        return None, (
            f"{plain.file}: tensor {plain.name} is not packed, but quantization_config asks for "
            f"{claim.form.describe()} and does not except {module}"
        )
    return None, None


def _size_problem(info: TensorInfo, shape: tuple[int, int], form: Form) -> str | None:
    num_outputs, num_inputs = shape
    group_size = form.group_size or num_inputs
    if num_inputs % group_size:
        return f"{info.file}: tensor {info.name}: {num_inputs} inputs are no whole number of groups of {group_size}"
    per_word = 32 // form.bits
    if form.layout in ("pack-quantized", "int-quantized"):
        per_byte = 8 // form.bits
        if num_inputs % per_byte:
            return f"{info.file}: tensor {info.name}: rows of {num_inputs} codes of {form.bits} bits end inside a byte"
    elif num_outputs % per_word or (form.layout != "awq" and num_inputs % per_word):
        return f"{info.file}: tensor {info.name}: a matrix of {list(shape)} does not fill words of {per_word} codes"
    return None


def _stored(module: str, shape: tuple[int, int], form: Form, tensors: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    num_outputs, num_inputs = shape
    groups = num_inputs // (form.group_size or num_inputs)
    words = {size: -(-size * form.bits // 32) for size in shape}

    def of(key: str, sizes: tuple[int, ...], *dtypes: str) -> Stored:
        return Stored(f"{module}.{key}", sizes, dtypes)

    if form.layout in ("pack-quantized", "int-quantized"):
        stored = {"scales": of("weight_scale", (num_outputs, groups), *SCALE_DTYPES)}
        if form.layout == "pack-quantized":
            stored["codes"] = of("weight_packed", (num_outputs, words[num_inputs]), "I32")
            stored["shape"] = of("weight_shape", (2,), "I64", "I32")
        else:
            stored["codes"] = of("weight", shape, "I8")
        if not form.is_symmetric:
            zeros = of("weight_zero_point", (num_outputs, groups), "I8")
            info = tensors.get(zeros.name)
            if form.layout == "pack-quantized" and (info is None or info.dtype != "I8"):
                zeros = Stored(zeros.name, (words[num_outputs], groups), ("I32",))
            stored["zeros"] = zeros
        return stored
    codes = (num_inputs, words[num_outputs]) if form.layout == "awq" else (words[num_inputs], num_outputs)
    stored = {
        "codes": of("qweight", codes, "I32"),
        "zeros": of("qzeros", (groups, words[num_outputs]), "I32"),
        "scales": of("scales", (groups, num_outputs), *SCALE_DTYPES),
    }
    if f"{module}.g_idx" in tensors:
        stored["index"] = of("g_idx", (num_inputs,), "I32", "I64")
    return stored


def packed_problems(packed: PackedWeight, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """One line for each tensor that is missing, of a size that does not fit, or of a wrong dtype."""
    codes = tensors.get(packed.stored["codes"].name)
    for wanted in packed.stored.values():
        info = tensors.get(wanted.name)
        if info is None:
            place = f"{codes.file}: " if codes is not None else ""
            yield f"{place}tensor {wanted.name} is missing ({packed.form.describe()})"
            continue
        if info.shape != wanted.shape:
            yield (
                f"{info.file}: tensor {info.name} has shape {list(info.shape)}, {packed.form.describe()} of "
                f"{list(packed.shape)} asks for {list(wanted.shape)}"
            )
        if info.dtype not in wanted.dtypes:
            yield f"{info.file}: tensor {info.name} has dtype {info.dtype}, not {' or '.join(wanted.dtypes)}"
