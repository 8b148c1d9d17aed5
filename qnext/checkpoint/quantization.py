"""What the quantization_config of a config.json says: which modules are packed, and how. No torch.

Known are the official FP8 form, compressed-tensors, AWQ and GPTQ. A key or value that could change what the tensors
stand for is refused by name.

Sources: compressed-tensors 0.20 (quantization_config.py, utils/match.py), AutoAWQ and transformers' AwqConfig,
GPTQModel (quantization/config.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from qnext.checkpoint.header import load_json
from qnext.checkpoint.patterns import ModuleNames, NamePieces, PatternError
from qnext.errors import ConfigError

FP8_BLOCK = 128
BITS = (4, 8)
MAX_GROUP_SIZE = 2**31


class Form(NamedTuple):
    """How a weight lies on disk. `group_size` None is one group of all inputs."""

    layout: str  # pack-quantized, int-quantized, awq, gptq or gptq_v2
    bits: int
    group_size: int | None
    is_symmetric: bool

    def describe(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.layout} int{self.bits}-{group}"


class Claim(NamedTuple):
    """What the configuration says of one module: its form, or None for plain; and whether it says so clearly."""

    form: Form | None
    is_certain: bool


class Rule(NamedTuple):
    form: Form
    targets: ModuleNames
    takes_linear: bool  # every linear layer


class Quantization(NamedTuple):
    """A quantization_config. The official FP8 form has no rules: there the dtype of each tensor decides."""

    method: str  # fp8, compressed-tensors, awq or gptq
    rules: tuple[Rule, ...]
    ignore: ModuleNames
    skip: NamePieces

    @property
    def is_fp8(self) -> bool:
        return self.method == "fp8"

    def claim(self, module: str) -> Claim:
        """What is said of a linear layer, by its name on disk without .weight."""
        if module in self.ignore or module in self.skip:
            return Claim(None, True)
        for rule in self.rules:
            if module in rule.targets:
                return Claim(rule.form, True)
        for rule in self.rules:
            if rule.takes_linear:
                return Claim(rule.form, not _is_doubtful(module, self.method))
        return Claim(None, True)


def _is_doubtful(module: str, method: str) -> bool:
    """Whether programs differ on the module being among "every linear layer", so that the tensors decide.

    Gates are no linear layers in newer releases of transformers, quantisers do not see the MTP module, and AWQ and
    GPTQ leave the head and what is outside their table of layers.
    """
    if module.startswith("mtp.") or module.endswith((".mlp.gate", ".shared_expert_gate")):
        return True
    return method in ("awq", "gptq") and (module == "lm_head" or module.endswith(".in_proj_ba"))


def read_quantization(folder: Path) -> Quantization | None:
    """The quantization_config of a folder's config.json; ConfigError names the key that is not understood."""
    path = folder / "config.json"
    block = load_json(path.read_bytes(), path).get("quantization_config")
    if block is None:
        return None
    reader = _Block(block, f"{path}: quantization_config")
    method = reader.choice("quant_method", ("fp8", "compressed-tensors", "awq", "gptq"))
    try:
        return _READERS[method](reader)
    except PatternError as error:
        raise ConfigError(f"{reader.where}: {error}") from None


class _Block:
    """Typed values of one JSON object."""

    def __init__(self, values: Any, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: must be an object or null")
        self.values: dict[str, Any] = values

    def error(self, key: str, problem: str) -> ConfigError:
        # One line, whatever a file says.
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in key[:80])
        return ConfigError(f"{self.where}.{shown}: {problem}")

    def refuse_unknown(self, *known: str) -> None:
        for key in self.values:
            if key not in known:
                raise self.error(key, "unknown key")

    def choice(self, key: str, allowed: tuple[Any, ...]) -> Any:
        """A value that is one of `allowed`; None among them stands for an absent key too."""
        value = self.values.get(key)
        for known in allowed:
            if value == known and type(value) is type(known):
                return value
        shown = ", ".join(repr(known) for known in allowed if known is not None)
        problem = "missing" if value is None else f"{repr(value)[:60]} is not supported"
        raise self.error(key, f"{problem}, only {shown or 'null'}")

    def group_size(self, key: str) -> int | None:
        """-1 is one group for all inputs."""
        value = self.values.get(key)
        if type(value) is not int:
            raise self.error(key, f"must be an integer, not {str(value)[:60]!r}")
        if value == -1:
            return None
        if not 0 < value < MAX_GROUP_SIZE:
            raise self.error(key, f"must be positive, or -1 for one group, not {value}")
        return value

    def names(self, key: str) -> list[str]:
        """A list of strings; null and an absent key are the empty list."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.error(key, "must be a list of names")
        return value

    def block(self, key: str) -> _Block:
        return _Block(self.values.get(key), f"{self.where}.{key}")

    def must_be_empty(self, *keys: str) -> None:
        for key in keys:
            if self.values.get(key):
                raise self.error(key, f"{str(self.values[key])[:60]} is not supported")


_NO_NAMES = ModuleNames((), ())
_NO_PIECES = NamePieces(())


def _module_names(names: list[str]) -> ModuleNames:
    """Names as compressed-tensors writes them: a pattern has the prefix re:."""
    marked = [name for name in names if name.startswith("re:")]
    return ModuleNames((name for name in names if not name.startswith("re:")), (name[3:] for name in marked))


def _read_fp8(reader: _Block) -> Quantization:
    for key, allowed in (
        ("fmt", ("e4m3", None)), ("activation_scheme", ("dynamic", None)),
        ("weight_block_size", ([FP8_BLOCK, FP8_BLOCK],)),
    ):  # fmt: skip
        reader.choice(key, allowed)
    return Quantization("fp8", (), _NO_NAMES, _NO_PIECES)


def _read_compressed_tensors(reader: _Block) -> Quantization:
    reader.refuse_unknown(
        "quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status", "version",
        "global_compression_ratio", "sparsity_config", "moe_sparsity_config", "transform_config",
    )  # fmt: skip
    reader.choice("quantization_status", ("compressed", "frozen", None))
    # A rotation of the inputs or a sparse mask changes what the codes stand for; a scale of the cache needs kernels.
    reader.must_be_empty("kv_cache_scheme", "transform_config", "moe_sparsity_config")
    if reader.values.get("sparsity_config"):
        reader.block("sparsity_config").choice("format", ("dense", None))
    groups = reader.block("config_groups")
    if not groups.values:
        raise reader.error("config_groups", "is empty")
    rules = tuple(_read_group(groups.block(name), reader) for name in groups.values)
    return Quantization("compressed-tensors", rules, _module_names(reader.names("ignore")), _NO_PIECES)


def _read_group(group: _Block, whole: _Block) -> Rule:
    group.refuse_unknown("targets", "weights", "input_activations", "output_activations", "format")
    layouts = ("pack-quantized", "int-quantized", "naive-quantized")
    source = group if group.values.get("format") is not None else whole
    layout = source.choice("format", layouts)
    if group.values.get("output_activations"):
        raise group.error("output_activations", "is not supported")
    if group.values.get("input_activations"):
        # Scales that are found while running need no tensor; activations may be kept finer than asked for.
        group.block("input_activations").choice("dynamic", (True, "local"))
    weights = group.block("weights")
    weights.refuse_unknown(
        "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder",
        "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
    )  # fmt: skip
    weights.choice("type", ("int",))
    weights.choice("dynamic", (False, None))
    weights.must_be_empty("block_structure")
    # Columns sorted over groups ("group") need an index per input; "weight" and "static" leave groups in order.
    weights.choice("actorder", ("weight", "static", False, None))
    bits = weights.choice("num_bits", BITS)
    is_symmetric = weights.choice("symmetric", (True, False, None))
    strategy = weights.choice("strategy", ("group", "channel", None))
    is_grouped = strategy == "group" or (strategy is None and weights.values.get("group_size") is not None)
    group_size = weights.group_size("group_size") if is_grouped else None
    targets = group.names("targets")
    named = [name for name in targets if name != "Linear"]
    form = Form(
        "pack-quantized" if layout == "pack-quantized" else "int-quantized", bits, group_size, is_symmetric is not False
    )
    return Rule(form, _module_names(named), "Linear" in targets)


def _read_awq(reader: _Block) -> Quantization:
    reader.refuse_unknown(
        "quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "backend",
        "modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
        "checkpoint_format", "format", "meta", "desc_act", "sym", "lm_head", "pack_dtype", "dynamic", "method",
    )  # fmt: skip
    if "version" in reader.values and isinstance(reader.values["version"], str):
        reader.values["version"] = reader.values["version"].lower()
    reader.choice("version", ("gemm", None))
    reader.choice("zero_point", (True,))
    reader.choice("checkpoint_format", ("gemm", None))
    reader.choice("format", ("gemm", None))
    reader.choice("desc_act", (False, None))
    reader.choice("pack_dtype", ("int32", None))
    reader.must_be_empty("dynamic")
    bits_key = "w_bit" if "w_bit" in reader.values and "bits" not in reader.values else "bits"
    group_key = (
        "q_group_size" if "q_group_size" in reader.values and "group_size" not in reader.values else "group_size"
    )
    form = Form("awq", reader.choice(bits_key, (4,)), reader.group_size(group_key), False)
    rule = Rule(form, _NO_NAMES, True)
    return Quantization("awq", (rule,), _NO_NAMES, NamePieces(reader.names("modules_to_not_convert")))


def _read_gptq(reader: _Block) -> Quantization:
    reader.refuse_unknown(
        "quant_method", "method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "dynamic",
        "lm_head", "modules_in_block_to_quantize", "pack_dtype", "meta", "damp_percent", "damp_auto_increment",
        "static_groups", "true_sequential", "model_name_or_path", "model_file_base_name", "dataset", "tokenizer",
        "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id", "backend",
        "use_cuda_fp16", "model_seqlen", "use_exllama", "disable_exllama", "exllama_config", "max_input_length",
        "cache_block_outputs", "act_group_aware", "mse", "hyb_act", "quantizer", "is_marlin_format", "offload_to_disk",
        "modules_to_not_convert",
    )  # fmt: skip
    formats = ("gptq", "gptq_v2", None)
    named = {reader.choice(key, formats) for key in ("checkpoint_format", "format")} - {None}
    if len(named) > 1:
        raise reader.error("format", "contradicts checkpoint_format")
    reader.choice("is_marlin_format", (False, None))
    reader.choice("pack_dtype", ("int32", None))
    # With desc_act the index of each input decides: an index in order is read, any other is refused by its tensor.
    reader.choice("desc_act", (True, False, None))
    form = Form(
        named.pop() if named else "gptq", reader.choice("bits", BITS), reader.group_size("group_size"),
        reader.choice("sym", (True, False)),
    )  # fmt: skip
    skipped = list(reader.names("modules_to_not_convert"))
    if reader.choice("lm_head", (True, False, None)) is False:
        skipped.append("lm_head")
    dynamic = reader.block("dynamic").values if reader.values.get("dynamic") else {}
    for pattern in dynamic:
        if not pattern.startswith("-:"):
            raise reader.error("dynamic", f"{pattern[:80]!r}: a form of its own for some modules is not supported")
    return Quantization(
        "gptq",
        (Rule(form, _NO_NAMES, True),),
        ModuleNames((), (pattern[2:] for pattern in dynamic)),
        NamePieces(skipped),
    )


_READERS = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed_tensors,
    "awq": _read_awq,
    "gptq": _read_gptq,
}
