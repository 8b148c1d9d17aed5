"""Which quantisation a folder declares, and where. Of several files and keys the first that says anything counts. No
torch.

The tables of known methods, and of those that are known but not read, are in `qnext.checkpoint.formats.forms`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qnext.checkpoint.formats.block import ConfigBlock, list_unknown, shown
from qnext.checkpoint.formats.compressed_tensors import read_compressed_tensors
from qnext.checkpoint.formats.floats import read_bitsandbytes, read_fp8, read_modelopt
from qnext.checkpoint.formats.forms import ALIASES, METHODS, NOT_READ, Quantization
from qnext.checkpoint.formats.gptq import read_auto_round, read_awq, read_gptq
from qnext.checkpoint.formats.records import METHOD, REST, read_records
from qnext.checkpoint.header import load_json
from qnext.checkpoint.patterns import PatternError
from qnext.config.bounded import read_bounded
from qnext.errors import ConfigError, NotSupported, warn

_READERS = {
    "fp8": read_fp8,
    "mxfp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "bitsandbytes": read_bitsandbytes,
    METHOD: read_records,
}
assert _READERS.keys() == METHODS.keys()
# Files beside config.json, asked where that is silent, and the method that they mean if they name none.
_SIDE_FILES = {
    "quantization_config.json": None,
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


def read_quantization(folder: Path) -> Quantization | None:
    """The quantisation that a folder declares, or None.

    NotSupported names a method or value that is not implemented, ConfigError a damaged one. One warning names all
    unknown keys.
    """
    found = _find_block(folder)
    if found is None:
        return None
    block, method = found
    try:
        quantization = _read(block, method)
    except PatternError as error:
        raise ConfigError(f"{block.where}: {error}") from None
    unknown = list_unknown(block)
    if unknown is not None:
        warn(unknown)
    return quantization


def _read(block: ConfigBlock, method: str) -> Quantization:
    quantization = _READERS[method](block)
    if method != METHOD or block.get(REST) is None:
        return quantization
    rest = block.block(REST)
    inner = _method(rest, None)
    if inner == METHOD:
        raise rest.error("quant_method", f"{METHOD} within {METHOD}")
    return quantization._replace(method=inner, rules=(*quantization.rules, *_READERS[inner](rest).rules))


def _find_block(folder: Path) -> tuple[ConfigBlock, str] | None:
    path = folder / "config.json"
    config = load_json(read_bounded(path), path)
    declared = config.get("quantization_config")
    if isinstance(config.get("quantization"), dict) and not (isinstance(declared, dict) and "quant_method" in declared):
        raise NotSupported(f"{path}: quantization: 'mlx' is not supported ({NOT_READ['mlx']}); {_what_is_read()}")
    for key in ("quantization_config", "compression_config"):
        values = config.get(key)
        if values is not None and values != {}:
            block = ConfigBlock(values, f"{path}: {key}")
            if key == "compression_config" and isinstance(values.get("quantization_config"), dict):
                block = block.block("quantization_config")
            return block, _method(block, "compressed-tensors" if key == "compression_config" else None)
    text = config.get("text_config")
    if isinstance(text, dict) and isinstance(text.get("quantization_config"), dict):
        block = ConfigBlock(text["quantization_config"], f"{path}: text_config.quantization_config")
        return block, _method(block, None)
    for name, method in _SIDE_FILES.items():
        path = folder / name
        if path.is_file():
            values = load_json(read_bounded(path), path)
            inner: Any = values.get("quantization")
            is_inner = method == "modelopt" and isinstance(inner, dict)
            block = ConfigBlock(inner, f"{path}: quantization") if is_inner else ConfigBlock(values, str(path))
            return block, _method(block, method)
    return None


def _method(block: ConfigBlock, default: str | None) -> str:
    """The method in the one spelling that the tables use."""
    value = block.get("quant_method")
    if value is None:
        value = default or _implied_method(block)
    if not isinstance(value, str):
        raise block.error("quant_method", f"must be a word, not {shown(value)!r}")
    name = value.lower()
    name = ALIASES.get(name, name)
    if name in METHODS:
        return name
    reason = f" ({NOT_READ[name]})" if name in NOT_READ else ""
    raise block.not_supported("quant_method", f"{shown(value)!r} is not supported{reason}; {_what_is_read()}")


def _implied_method(block: ConfigBlock) -> str:
    """Blocks without quant_method that have a key which only one program writes."""
    for key, method in (
        ("load_in_4bit", "bitsandbytes"),
        ("load_in_8bit", "bitsandbytes"),
        ("quant_algo", "modelopt"),
        ("config_groups", "compressed-tensors"),
        ("autoround_version", "auto-round"),
        ("zero_point", "awq"),
        ("desc_act", "gptq"),
        ("weight_block_size", "fp8"),
    ):
        if key in block.values:
            return method
    raise block.error("quant_method", f"missing; {_what_is_read()}")


def _what_is_read() -> str:
    return f"read are {', '.join(METHODS)}"
