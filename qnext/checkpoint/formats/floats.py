"""The blocks of FP8 folders, ModelOpt and bitsandbytes. In these the tensors of each weight say what they are. No
torch.

Sources: transformers' FineGrainedFP8Config, FbgemmFp8Config and BitsAndBytesConfig; ModelOpt's unified checkpoints
(hf_quant_config.json and the same under config.json's quantization_config).
"""

from __future__ import annotations

import re

from qnext.checkpoint.formats.block import ConfigBlock
from qnext.checkpoint.formats.forms import Form, Quantization, Rule
from qnext.checkpoint.patterns import ModuleNames, NamePieces
from qnext.errors import warn

_EXCEPTIONS = ("modules_to_not_convert", "ignored_layers", "modules_to_convert", "ignore")


def read_fp8(block: ConfigBlock) -> Quantization:
    """Read the block. The dtype of each weight says whether it is FP8, so lists of modules are not needed."""
    block.neutral("quant_method", "scale_fmt", "dequantize", "activation_scale_ub", "use_static_scales", "version")
    block.choice("fmt", ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2", "e4m3fn", None))
    block.choice("activation_scheme", ("dynamic", "static", None))  # activations are kept finer
    block.choice("expert_dtype", ("fp8", None))
    for key in _EXCEPTIONS:
        block.names(key)
    form = Form("fp8", 8, block=block.block_size("weight_block_size"))
    return Quantization("fp8", (Rule(form, None, False),), block.where)


_ALGORITHMS: dict[str | None, Form | None] = {
    "FP8": Form("fp8", 8, block=(0, 0)),
    "FP8_PER_CHANNEL_PER_TOKEN": Form("fp8", 8, block=(1, 0)),
    "FP8_PB_WO": Form("fp8", 8, block=(128, 128)),
    "FP8_PB_REAL": Form("fp8", 8, block=(128, 128)),
    "MXFP8": Form("fp8", 8, block=(1, 32)),
    "NVFP4": Form("nvfp4-modelopt", 4, 16),
    "W4A16_NVFP4": Form("nvfp4-modelopt", 4, 16),
    "MIXED_PRECISION": None,
    None: None,
}


def read_modelopt(block: ConfigBlock) -> Quantization:
    """Read the block. Raises NotSupported for algorithms that scale inputs (AWQ) or whose layouts are not known."""
    block.neutral(
        "quant_method",
        "producer",
        "group_size",
        "config_groups",
        "quantized_layers",
        "version",
        "activation_scheme",
        "has_zero_point",
        "pre_quant_scale",
        "format",
        "quantization_status",
        "weight_only",
        "smoothquant_val",
    )
    algorithm = block.choice("quant_algo", tuple(_ALGORITHMS))
    if block.get("kv_cache_quant_algo") or block.get("kv_cache_scheme"):
        warn(f"{block.where}: the cache is kept finer than kv_cache_scheme asks for")
    kept = [*block.names("exclude_modules"), *block.names("ignore")]
    patterns = [".*".join(map(re.escape, name.split("*"))) + "$" for name in kept if "*" in name]
    exact = NamePieces([name for name in kept if "*" not in name])
    rules = [Rule(None, exact), Rule(None, ModuleNames((), patterns))]
    form = _ALGORITHMS[algorithm]
    if form is not None:
        rules.append(Rule(form, None, False))
    return Quantization("modelopt", tuple(rules), block.where)


def read_bitsandbytes(block: ConfigBlock) -> Quantization:
    block.neutral(
        "quant_method",
        "_load_in_4bit",
        "_load_in_8bit",
        "load_in_8bit",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_use_double_quant",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
        "llm_int8_threshold",
        "target_parameters",
    )
    kind = block.choice("bnb_4bit_quant_type", ("nf4", "fp4", None)) or "fp4"
    form = Form(f"bnb-{kind}", 4, 64) if block.get("load_in_4bit") else Form("bnb-int8", 8)
    skipped = NamePieces(block.names("llm_int8_skip_modules"))
    return Quantization("bitsandbytes", (Rule(None, skipped), Rule(form, None, False)), block.where)
