"""Finds which weights are packed, and in which form. The tensors decide, and config.json must not contradict. No torch.

Legend: F outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qnext.checkpoint.formats.forms import LAYOUTS, Form, FormClaim, Quantization
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import Target
from qnext.checkpoint.records import PANELS
from qnext.checkpoint.stored import SCALE_DTYPES, Stored, choose_fp8_block, size_problem, stored_tensors
from qnext.errors import NotSupported, warn
from qnext.planning import Kind

# Names after a module's of tensors that scale activations or the cache, which are both kept finer here.
_ACTIVATION_TENSORS = frozenset(
    {
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "input_scale_ub",
        "activation_scale",
        "output_scale",
        "output_zero_point",
        "q_scale",
        "k_scale",
        "v_scale",
        "kv_scale",
        "k_zero_point",
        "v_zero_point",
    }
)
# The same of tensors that a weight may keep which was stored as it is.
_WEIGHT_TENSORS = frozenset({"weight_scale", "weight_zero_point", "weight_g_idx"})
_PLAIN_DTYPES = ("BF16", "F16", "F32")


class PackedWeight(NamedTuple):
    """A packed weight [F, D]. `stored` has its tensors by their content: codes, scales, zeros, shape, index, ..."""

    shape: tuple[int, int]
    form: Form
    stored: dict[str, Stored]

    @property
    def group_size(self) -> int:
        """The inputs that share a scale, where codes are kept."""
        return self.form.group_size or self.shape[1]


class PackedWeights(NamedTuple):
    """What the tensors say, and the faults in them, one line each."""

    weights: dict[str, PackedWeight]  # by name of the weight
    problems: list[str]
    disputed: frozenset[str]  # names of weights that a line of `problems` is about
    passed_over: frozenset[str]  # names of tensors that are not needed


class _Differences:
    """Weights where configuration and tensors differ: how many of each kind, and one of them."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, text: str, module: str) -> None:
        self._found.setdefault(text, []).append(module)

    def tell(self, where: str) -> None:
        for text, modules in self._found.items():
            count = f"{len(modules)} weights (the first is {modules[0]})" if modules[1:] else modules[0]
            warn(f"{where}: {text.format(count)}; read as the tensors are")


def find_packed(
    quantization: Quantization | None, targets: Mapping[str, Target], tensors: Mapping[str, TensorInfo]
) -> PackedWeights:
    """The packed ones among the weights `targets`, by name on disk.

    Tensors that show their own form are read in it whatever config.json says, with a warning where it differs. Raises
    NotSupported for tensors that scale inputs.
    """
    weights: dict[str, PackedWeight] = {}
    problems: dict[str, str] = {}
    differences = _Differences()
    for name, (parameter, part) in targets.items():
        module, shape = part.module, part.shape
        layout, mark = _layout_of(name, shape, tensors)
        claim = FormClaim(None, quantization is None) if quantization is None else quantization.claim(module, parameter)
        if layout is None:
            is_plain = name in tensors and len(shape) == 2 and tensors[name].dtype in _PLAIN_DTYPES
            if claim.form is not None and claim.is_certain and is_plain:
                differences.add(f"{claim.form.describe()} is asked for {{}}, stored plain", module)
            continue
        problem = _place_problem(targets[name], layout, tensors[mark], tensors)
        form = None
        if problem is None:
            form, problem = _form_of(quantization, claim, layout, (shape[0], shape[1]), name, tensors)
        if form is not None and problem is None:
            matrix = (shape[0], shape[1])
            problem = size_problem(tensors[mark], matrix, form)
            stored = stored_tensors(name, matrix, form, tensors)
            if (bias := f"{module}.bias") in tensors and bias not in targets:
                # AutoGPTQ gave every module one; that it is zero is for the values to show.
                stored["bias"] = Stored(bias, (shape[0],), SCALE_DTYPES)
            weights[name] = PackedWeight(matrix, form, stored)
            if claim.is_certain or claim.form is not None:
                _compare(claim, form, module, differences)
        if problem is not None:
            problems[name] = problem
            weights.pop(name, None)
    differences.tell("config.json" if quantization is None else quantization.where)
    passed_over = _passed_over(targets, tensors) if quantization is not None or weights else frozenset()
    return PackedWeights(weights, list(problems.values()), frozenset(problems), passed_over)


def _layout_of(name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> tuple[str | None, str]:
    """The layout of a weight, and the tensor that shows it; None for a weight that is plain or not there."""
    module = name.removesuffix(".weight")
    if (mark := f"{module}.{PANELS}") in tensors:
        return "panels", mark
    scale = tensors.get(f"{module}.weight_scale")
    if (mark := f"{module}.weight_packed") in tensors:
        if tensors[mark].dtype != "U8":
            return "pack-quantized", mark
        is_nvfp4 = f"{module}.weight_global_scale" in tensors or (scale is not None and scale.dtype == "F8_E4M3")
        return ("nvfp4" if is_nvfp4 else "mxfp4"), mark
    if (mark := f"{module}.qweight") in tensors:
        return ("awq" if tensors[mark].shape[:1] == shape[1:2] else "gptq"), mark
    if name not in tensors:
        return None, name
    if f"{name}.absmax" in tensors:
        return ("bnb-fp4" if f"{name}.quant_state.bitsandbytes__fp4" in tensors else "bnb-nf4"), name
    dtype = tensors[name].dtype
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return "fp8", name
    if dtype == "U8" and scale is not None:
        return "nvfp4-modelopt", name
    if dtype == "I8":
        if f"{module}.SCB" in tensors:
            return "bnb-int8", name
        return ("int-quantized", name) if scale is not None else (None, name)
    return None, name


def _place_problem(target: Target, layout: str, mark: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Whether this weight can be packed at all, and is there once."""
    name, module, shape = target.part.name, target.part.module, target.part.shape
    for key in ("pre_quant_scale", "smoother", "input_channel_scale"):
        if f"{module}.{key}" in tensors:
            info = tensors[f"{module}.{key}"]
            raise NotSupported(f"{info.file}: tensor {info.name} scales the inputs of {module}, which is not supported")
    if len(shape) != 2 and layout == "fp8":
        return f"{mark.file}: tensor {name} is {mark.dtype}, but no matrix"
    is_embedding = target.parameter.kind is Kind.EMBEDDING and LAYOUTS[layout].kind == "int"
    if len(shape) != 2 or is_embedding:
        return f"{mark.file}: tensor {mark.name}: {module} cannot be packed"
    if mark.name != name and name in tensors:
        plain = tensors[name]
        return f"{plain.file}: tensor {plain.name} is there beside {mark.name}"
    return None


def _form_of(
    quantization: Quantization | None,
    claim: FormClaim,
    layout: str,
    shape: tuple[int, int],
    name: str,
    tensors: Mapping[str, TensorInfo],
) -> tuple[Form | None, str | None]:
    """The form of a packed weight: as it is claimed where the layout is, otherwise as shapes say; or what is wrong."""
    layouts = ("gptq", "gptq_v2") if layout == "gptq" else (layout,)
    claimed = (claim.form, *(() if quantization is None else quantization.forms))
    form = next((form for form in claimed if form is not None and form.layout in layouts), None)
    module = name.removesuffix(".weight")
    if layout == "fp8":
        return choose_fp8_block(tensors[name], shape, None if form is None else form.block, tensors)
    if LAYOUTS[layout].kind == "float":
        group_size = {"mxfp4": 32, "bnb-nf4": 64, "bnb-fp4": 64}.get(layout, 16)
        return Form(layout, 4, group_size), None
    if layout == "bnb-int8":
        return Form(layout, 8), None
    if form is None:
        info = tensors[f"{module}.{LAYOUTS[layout].mark}"]
        if quantization is None and layout != "pack-quantized":
            problem = f"{info.file}: tensor {info.name} is part of a packed weight, but config.json has no "
            return None, f"{problem}quantization_config"
        if layout == "gptq":
            return None, f"{info.file}: tensor {info.name} is GPTQ's, of which quantization_config says nothing"
        has_zeros = f"{module}.weight_zero_point" in tensors
        is_symmetric = layout in ("pack-quantized", "int-quantized") and not has_zeros
        form = Form(layout, 8 if layout == "int-quantized" else 0, 0, is_symmetric)
    return _measured(form, shape, module, tensors)


def _measured(
    form: Form, shape: tuple[int, int], module: str, tensors: Mapping[str, TensorInfo]
) -> tuple[Form | None, str | None]:
    """A form whose bits and group size are known: where it leaves them open (0), the sizes of the tensors say them."""
    codes = tensors.get(f"{module}.{LAYOUTS[form.layout].mark}")
    if form.bits == 0:
        assert codes is not None
        length = codes.shape[-1] if form.layout == "pack-quantized" else codes.shape[0]
        bits = 4 if form.layout == "awq" else length * 32 // shape[1]
        if not 2 <= bits <= 8:
            return None, f"{codes.file}: tensor {codes.name} of shape {list(codes.shape)} holds no {list(shape)} codes"
        form = form._replace(bits=bits)
    if form.group_size == 0:
        is_words = form.layout in ("awq", "gptq", "gptq_v2")
        scales = tensors.get(f"{module}.{'scales' if is_words else 'weight_scale'}")
        if scales is None:
            return None, f"{'' if codes is None else f'{codes.file}: '}tensor {module}: its scales are missing"
        groups = (scales.shape[0] if is_words else scales.shape[-1]) if scales.shape else 1
        if groups == 0 or shape[1] % groups:
            return None, f"{scales.file}: tensor {scales.name} has shape {list(scales.shape)}, which divides no {shape}"
        form = form._replace(group_size=None if groups == 1 else shape[1] // groups)
    return form, None


def _compare(claim: FormClaim, form: Form, module: str, differences: _Differences) -> None:
    if claim.form is None:
        differences.add(f"leaves {{}} plain, stored as {form.describe()}", module)
    elif claim.form.layout != form.layout or (claim.form.block is not None and claim.form.block != form.block):
        differences.add(f"{claim.form.describe()} is asked for {{}}, stored as {form.describe()}", module)


def _passed_over(targets: Mapping[str, Target], tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Tensors that no weight needs, with one warning of those that belong to weights: see scales_of_activations."""
    modules = {target.part.module for target in targets.values()}
    modules |= {module.rpartition(".")[0] for module in modules}
    found, unused = [], []
    for name in tensors:
        module, _, key = name.rpartition(".")
        if key in _ACTIVATION_TENSORS and (module in modules or module.rpartition(".")[0] in modules):
            found.append(name)
        elif key in _WEIGHT_TENSORS and f"{module}.weight" in targets:
            weight = tensors.get(f"{module}.weight")
            if weight is not None and weight.dtype in _PLAIN_DTYPES:
                unused.append(name)
    if unused:
        place = tensors[unused[0]].file.parent
        warn(f"{place}: {_count(unused)} ignored: the weights beside them are stored plain")
    return frozenset((*found, *unused))


def scales_of_activations(passed_over: frozenset[str]) -> str | None:
    """What `qnext verify` says about scales of activations. Every static folder has them, so loading such a folder says
    nothing."""
    found = sorted(name for name in passed_over if name.rpartition(".")[2] in _ACTIVATION_TENSORS)
    if not found:
        return None
    return f"{_count(found)} ignored: activations and the cache are kept finer than they ask for"


def _count(names: list[str]) -> str:
    return f"{len(names)} tensors like {names[0]} are" if names[1:] else f"tensor {names[0]} is"


def packed_problems(packed: PackedWeight, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """One line for each tensor that is missing, or has a wrong size or dtype."""
    codes = tensors.get(packed.stored["codes"].name)
    for kind, wanted in packed.stored.items():
        info = tensors.get(wanted.name)
        if info is None:
            place = f"{codes.file}: " if codes is not None else ""
            if packed.form.layout == "fp8" and codes is not None and kind == "scales":
                yield f"{place}tensor {codes.name} is {codes.dtype}, but its scales {wanted.name} are missing"
            else:
                yield f"{place}tensor {wanted.name} is missing ({packed.form.describe()})"
            continue
        if info.shape != wanted.shape:
            yield (
                f"{info.file}: tensor {info.name} has shape {list(info.shape)}, {packed.form.describe()} of "
                f"{list(packed.shape)} asks for {list(wanted.shape)}"
            )
        if info.dtype not in wanted.dtypes:
            yield f"{info.file}: tensor {info.name} has dtype {info.dtype}, not {' or '.join(wanted.dtypes)}"
