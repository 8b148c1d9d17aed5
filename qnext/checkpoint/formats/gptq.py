"""The blocks of GPTQ, AWQ and AutoRound, which packs as one of the two. No torch.

Sources: GPTQModel (quantization/config.py, utils/model.py), transformers' GPTQConfig, AutoAWQ and AwqConfig,
AutoRound (export_to_autoround, inference/backend.py: which packing formats store zeros less one).
"""

from __future__ import annotations

from typing import Any

from qnext.checkpoint.formats.block import ConfigBlock
from qnext.checkpoint.formats.compressed_tensors import read_compressed_tensors
from qnext.checkpoint.formats.forms import BITS, Form, Quantization, Rule
from qnext.checkpoint.patterns import ModuleNames, NamePieces, OtherModules, searched

SHAPES_DECIDE = 0  # as bits or group size of a form: the sizes of the tensors say it

# How the makers of a folder ran, and what other programs compute it with.
_WORDS = """
quant_method method desc_act meta damp_percent damp_auto_increment static_groups true_sequential model_name_or_path
model_file_base_name dataset tokenizer batch_size module_name_preceding_first_block pad_token_id backend use_cuda_fp16
model_seqlen use_exllama disable_exllama exllama_config max_input_length cache_block_outputs act_group_aware mse
hyb_act quantizer offload_to_disk offload_to_disk_path lm_head_low_gpu_mem_usage do_fuse fuse_max_seq_len
modules_to_fuse uri v2 v2_alpha gptaq gptaq_alpha foem failsafe fallback pack_impl device gc_mode
wait_for_submodule_finalizers parallel_packing process hessian moe smooth v2_memory_device fail_safe
hessian_chunk_size use_marlin gptaq_memory_device mock_quantization buffered_fwd autoround_version iters nsamples
seqlen lr minmax_lr enable_quanted_input enable_minmax_tuning low_gpu_mem_usage gradient_accumulate_steps amp
scale_dtype quant_block_list enable_norm_bias_tuning data_type act_bits act_group_size act_sym act_dynamic
act_data_type super_bits super_group_size
"""
_NEUTRAL = tuple(_WORDS.split())


def _default_rules(block: ConfigBlock, form: Form) -> list[Rule]:
    """Exceptions that GPTQ, AWQ and AutoRound write alike, and then the form of all the rest."""
    rules = [Rule(None, NamePieces(block.names("modules_to_not_convert", "ignore")))]
    inside = _flat_names(block, "modules_in_block_to_quantize")
    if inside:
        rules.append(Rule(None, OtherModules(NamePieces(inside), within=".layers.")))
    blocks = _flat_names(block, "block_name_to_quantize") or _flat_names(block, "to_quant_block_names")
    if blocks:
        rules.append(Rule(None, OtherModules(NamePieces(blocks), within=""), False))
    return [*rules, Rule(form, None)]


def _flat_names(block: ConfigBlock, key: str) -> list[str]:
    """Names in a list, a list of lists, or one text with commas."""
    value = block.get(key)
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, list) and any(isinstance(names, list) for names in value):
        value = [name for names in value for name in (names if isinstance(names, list) else [names])]
    if value is not None and (not isinstance(value, list) or not all(isinstance(name, str) for name in value)):
        raise block.error(key, "must be a list of names")
    return [name for name in value or [] if name]


def _codes_form(block: ConfigBlock, layout: str, keys: tuple[str, str], default: Form | None = None) -> Form:
    """bits, group_size and sym of one object; what is absent there is as in `default`, or for the shapes to say."""
    default = default or Form(layout, SHAPES_DECIDE, SHAPES_DECIDE)
    bits, group_size = default.bits, default.group_size
    if block.get(keys[0]) is not None:
        bits = block.choice(keys[0], (4,) if layout == "awq" else BITS)
    if block.get(keys[1]) is not None:
        group_size = block.group_size(keys[1])
    if layout == "awq":
        block.neutral("sym")
        return Form(layout, bits, group_size, False)
    return Form(layout, bits, group_size, block.flag("sym", default.is_symmetric) is True)


def read_gptq(block: ConfigBlock) -> Quantization:
    """Read the block. `dynamic` is a list of patterns; the first that matches applies: "-:" leaves a module plain,
    others change the form."""
    block.neutral(*_NEUTRAL)
    block.must_be_empty("adapter", "rotation")  # both change what the codes alone stand for
    formats = ("gptq", "gptq_v2", None)
    named = {block.choice(key, formats) for key in ("checkpoint_format", "format")} - {None}
    if len(named) > 1:
        raise block.error("format", "contradicts checkpoint_format")
    if block.get("quant_method") == "gptq_v2":
        named = named or {"gptq_v2"}
    block.choice("is_marlin_format", (False, None))
    block.choice("pack_dtype", ("int32", None))
    bits_key = "wbits" if block.get("wbits") is not None and block.get("bits") is None else "bits"
    form = _codes_form(block, named.pop() if named else "gptq", (bits_key, "group_size"))
    rules = _dynamic_rules(block, form)
    if block.flag("lm_head") is not True:
        rules.insert(0, Rule(None, NamePieces(["lm_head"])))
    return Quantization("gptq", (*rules, *_default_rules(block, form)), block.where)


def _dynamic_rules(block: ConfigBlock, form: Form) -> list[Rule]:
    if not block.get("dynamic"):
        return []
    dynamic = block.block("dynamic")
    rules: list[Rule] = []
    for pattern, values in dynamic.values.items():
        names = ModuleNames((), [pattern.removeprefix("-:").removeprefix("+:")])
        if pattern.startswith("-:"):
            dynamic.neutral(pattern)
            rules.append(Rule(None, names))
        elif not values:  # nothing is changed for these modules
            dynamic.neutral(pattern)
            rules.append(Rule(form, names, False))
        else:
            inner = dynamic.block(pattern)
            inner.neutral(*_NEUTRAL)
            rules.append(Rule(_codes_form(inner, form.layout, ("bits", "group_size"), form), names))
    return rules


def read_awq(block: ConfigBlock) -> Quantization:
    block.neutral(*_NEUTRAL, "lm_head")
    version = block.word("version")
    if version not in ("gemm", "exllama", "ipex", None):  # the last two are kernels for the same layout
        raise block.not_supported("version", f"{version!r} is not supported, only 'gemm'")
    block.choice("zero_point", (True, None))
    block.choice("checkpoint_format", ("gemm", None))
    block.choice("format", ("gemm", None))
    block.choice("pack_dtype", ("int32", None))
    block.must_be_empty("dynamic")
    bits_key = "w_bit" if block.get("w_bit") is not None and block.get("bits") is None else "bits"
    old = block.get("q_group_size") is not None and block.get("group_size") is None
    form = _codes_form(block, "awq", (bits_key, "q_group_size" if old else "group_size"))
    return Quantization("awq", tuple(_default_rules(block, form)), block.where)


_AUTO_ROUND_WORDS = (
    "supported_types model_free enable_alg_ext quant_lm_head static_kv_dtype scheme algorithm regex_config provider"
)
# The packings of AutoRound whose zeros are stored as they are; those of auto_gptq are stored less one.
_ZEROS_AS_THEY_ARE = ("auto_round", "auto_round:gptqmodel", "auto_round:auto_round", "auto_round:gptq_v2")


def read_auto_round(block: ConfigBlock) -> Quantization:
    """Read the block. Integers are GPTQ or AWQ by `packing_format`. Floats and groups have the names of
    compressed-tensors."""
    if block.get("config_groups"):
        block.neutral("packing_format", *_NEUTRAL, *_AUTO_ROUND_WORDS.split())
        return read_compressed_tensors(block)._replace(method="auto-round")
    block.neutral(*_NEUTRAL, "lm_head", *_AUTO_ROUND_WORDS.split())
    block.must_be_empty("transform_config", "rotation_config")
    packing = block.word("packing_format")
    if packing is None:
        backend = block.word("backend") or ""
        packing = backend if backend.startswith("auto_round:") else "auto_round:auto_gptq"
    data_type = block.word("data_type") or "int"
    is_packed = packing in _ZEROS_AS_THEY_ARE or "gptq" in packing or "awq" in packing
    if not data_type.startswith("int") or not is_packed:
        # Floats, and packings of other programs, whose tensors say what they are.
        block.neutral("bits", "group_size", "sym", "extra_config", "dynamic", *_BLOCK_KEYS)
        return Quantization("auto-round", (), block.where)
    layout = "awq" if "awq" in packing else "gptq_v2" if packing in _ZEROS_AS_THEY_ARE else "gptq"
    form = _codes_form(block, layout, ("bits", "group_size"))
    rules = (*_extra_rules(block, form), *_dynamic_rules(block, form), *_default_rules(block, form))
    return Quantization("auto-round", rules, block.where)


_BLOCK_KEYS = (
    "block_name_to_quantize",
    "to_quant_block_names",
    "modules_in_block_to_quantize",
    "modules_to_not_convert",
)


def _extra_rules(block: ConfigBlock, form: Form) -> list[Rule]:
    """extra_config: by exact name, and where none is there by a pattern that is found anywhere in the name."""
    if not block.get("extra_config"):
        return []
    extra = block.block("extra_config")
    exact: list[Rule] = []
    patterns: list[Rule] = []
    for key in extra.values:
        inner = extra.block(key)
        inner.neutral(*_NEUTRAL, "in_blocks", "fixed_by_user", "tmp")
        own = None if _is_plain(inner) else _codes_form(inner, form.layout, ("bits", "group_size"), form)
        if own is None:
            inner.neutral("bits", "group_size", "sym")
        if any(letter in key for letter in "*+?[](){}|^$\\"):
            patterns.append(Rule(own, searched(key)))
        else:
            exact.append(Rule(own, NamePieces([key]) if own is None else ModuleNames([key], ())))
    return [*exact, *patterns]


def _is_plain(values: ConfigBlock) -> bool:
    bits: Any = values.get("bits")
    return type(bits) is int and bits >= 16
