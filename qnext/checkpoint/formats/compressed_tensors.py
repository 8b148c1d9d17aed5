"""The block of compressed-tensors: groups of modules, each with a form. No torch.

Source: compressed-tensors 0.20 (quantization/quant_config.py, quant_args.py, utils/match.py, config/base.py).
"""

from __future__ import annotations

from qnext.checkpoint.formats.block import ConfigBlock
from qnext.checkpoint.formats.forms import BITS, Form, Quantization, Rule
from qnext.checkpoint.patterns import module_names
from qnext.errors import NotSupported, warn

# format -> the layout of weights that are integers, and that of floats.
_LAYOUTS: dict[str, tuple[str | None, str | None]] = {
    "pack-quantized": ("pack-quantized", None),
    "int-quantized": ("int-quantized", None),
    "naive-quantized": ("int-quantized", "fp8"),
    "float-quantized": (None, "fp8"),
    "nvfp4-pack-quantized": (None, "nvfp4"),
    "mxfp4-pack-quantized": (None, "mxfp4"),
    "mxfp8-quantized": (None, "fp8"),
}
FORMATS = (*_LAYOUTS, "dense", "mixed-precision")
_FLOAT_GROUPS = {"nvfp4": 16, "mxfp4": 32}


def read_compressed_tensors(block: ConfigBlock) -> Quantization:
    """Read the block. Raises NotSupported for sparse weights, rotations, and formats that are not in FORMATS."""
    block.neutral("quant_method", "quantization_status", "version", "global_compression_ratio", "run_compressed")
    # A rotation of the inputs or a sparse mask changes what the codes stand for.
    _no_transform(block)
    block.must_be_empty("moe_sparsity_config")
    if block.get("sparsity_config"):
        ConfigBlock(block.get("sparsity_config"), f"{block.where}.sparsity_config").choice("format", ("dense", None))
    if block.get("kv_cache_scheme"):
        warn(f"{block.where}.kv_cache_scheme: the cache is kept finer than it asks for")
    whole = block.choice("format", (*FORMATS, None))
    named = [Rule(None, module_names(block.names("ignore")))]
    general: list[Rule] = []
    groups = block.block("config_groups")
    if not groups.values and whole != "dense":
        raise block.error("config_groups", "is empty")
    for key in groups.values:
        form, targets = _read_group(groups.block(key), whole)
        classes = [name for name in targets if name[0].isupper() and "." not in name]
        named.append(Rule(form, module_names([name for name in targets if name not in classes])))
        if classes:
            # Which modules another class stands for is for the tensors to say.
            general.append(Rule(form, None, "Linear" in classes))
    return Quantization("compressed-tensors", (*named, *general), block.where)


def _no_transform(block: ConfigBlock) -> None:
    transform = block.get("transform_config")
    if isinstance(transform, dict):
        transform = transform.get("config_groups")
    if transform:
        raise block.not_supported("transform_config", "rotated weights are not supported")


def _read_group(group: ConfigBlock, whole: str | None) -> tuple[Form | None, list[str]]:
    group.neutral("input_activations", "output_activations")  # they are kept finer than is asked for
    layout = group.choice("format", (*FORMATS, None)) or whole
    targets = group.names("targets")
    if group.get("weights") is None or layout == "dense":
        group.neutral("weights")
        return None, targets
    weights = group.block("weights")
    weights.neutral("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder", "dynamic", "group_size")
    kind = weights.choice("type", ("int", "float", None)) or "int"
    if layout not in _LAYOUTS:  # mixed-precision or absent: the numbers say it
        layout = _usual_format(weights, kind, has_activations=bool(group.get("input_activations")))
    name = _LAYOUTS[layout][kind == "float"]
    if name is None:
        raise NotSupported(f"{weights.where}.type: {kind!r} is not supported for {layout}")
    is_symmetric = weights.flag("symmetric", True) is True
    if kind == "float":
        weights.neutral("num_bits")
        if not is_symmetric:
            raise weights.not_supported("symmetric", "False is not supported for floats")
        return _float_form(name, layout, weights), targets
    weights.must_be_empty("block_structure")
    bits = weights.choice("num_bits", BITS) if name == "pack-quantized" else weights.choice("num_bits", (4, 8))
    strategy = weights.choice("strategy", ("group", "channel", "tensor", None))
    is_grouped = strategy == "group" or (strategy is None and weights.get("group_size") is not None)
    return Form(name, bits, weights.group_size("group_size") if is_grouped else None, is_symmetric), targets


def _usual_format(weights: ConfigBlock, kind: str, *, has_activations: bool) -> str:
    """What compressed-tensors infers for a scheme that names no format."""
    bits = weights.get("num_bits")
    if kind == "int":
        return "int-quantized" if bits == 8 and has_activations else "pack-quantized"
    if bits == 8:
        return "float-quantized"
    return "mxfp4-pack-quantized" if weights.get("group_size") == 32 else "nvfp4-pack-quantized"


def _float_form(name: str, layout: str, weights: ConfigBlock) -> Form:
    strategy = weights.choice("strategy", ("tensor", "channel", "block", "group", "tensor_group", None))
    group_size = weights.get("group_size")
    if name != "fp8":
        weights.neutral("block_structure")
        return Form(name, 4, _FLOAT_GROUPS[name])
    structure = weights.get("block_structure")
    if isinstance(structure, str) and structure.replace("x", "", 1).isdigit() and "x" in structure.strip("x"):
        weights.values["block_structure"] = [int(size) for size in structure.split("x")]
    if layout == "mxfp8-quantized":
        return Form("fp8", 8, block=(1, 32))
    if strategy == "block":
        return Form("fp8", 8, block=weights.block_size("block_structure"))
    if strategy == "group" and type(group_size) is int and group_size > 0:
        return Form("fp8", 8, block=(1, group_size))
    return Form("fp8", 8, block={"tensor": (0, 0), "channel": (1, 0)}.get(strategy or ""))
