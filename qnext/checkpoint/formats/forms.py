"""How weights may lie on disk, what a configuration claims about them, and the tables of what is read. No torch."""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import NamedTuple

from qnext.planning import Kind, ParameterInfo
from qnext.planning.expert_records import MatrixForm

BITS = (2, 3, 4, 5, 6, 7, 8)


class FormLayout(NamedTuple):
    """One way in which the tensors of a weight lie on disk."""

    kind: str  # int: codes stay codes in memory; float: the weight becomes a tensor
    mark: str  # the name after the module's of the tensor that holds the codes
    text: str  # for people


LAYOUTS = {
    "pack-quantized": FormLayout("int", "weight_packed", "compressed-tensors, integers packed in words"),
    "int-quantized": FormLayout("int", "weight", "compressed-tensors W8A8 and the like, one byte for each number"),
    "awq": FormLayout("int", "qweight", "AWQ, version gemm"),
    "gptq": FormLayout("int", "qweight", "GPTQ, first format (zeros less one)"),
    "gptq_v2": FormLayout("int", "qweight", "GPTQ, second format"),
    "bnb-int8": FormLayout("int", "weight", "bitsandbytes LLM.int8()"),
    "panels": FormLayout("int", "weight_panels", "qnext's records of experts, in the order of its kernels"),
    "fp8": FormLayout("float", "weight", "FP8 (E4M3 or E5M2) with scales per tensor, channel, group or block"),
    "nvfp4": FormLayout("float", "weight_packed", "NVFP4 of compressed-tensors"),
    "nvfp4-modelopt": FormLayout("float", "weight", "NVFP4 of ModelOpt"),
    "mxfp4": FormLayout("float", "weight_packed", "MXFP4 of compressed-tensors"),
    "bnb-nf4": FormLayout("float", "weight", "bitsandbytes NF4, plain and double quantised"),
    "bnb-fp4": FormLayout("float", "weight", "bitsandbytes FP4, plain and double quantised"),
}

# quant_method -> what is read of it. Other spellings of a method stand in `ALIASES`.
METHODS = {
    "fp8": "the official FP8 form, and its variants (per tensor, other blocks, E5M2, power-of-two scales)",
    "mxfp8": "FP8 with power-of-two scales for groups of inputs",
    "fbgemm_fp8": "FP8 per channel",
    "compressed-tensors": "int 2 to 8 bits packed, W8A8, FP8, NVFP4, MXFP4, MXFP8, mixed-precision",
    "modelopt": "FP8 and NVFP4, also where only hf_quant_config.json says so",
    "gptq": "2, 3, 4 and 8 bits, both formats, forms by module (dynamic), activation order",
    "awq": "4 bits, version gemm",
    "auto-round": "as the GPTQ, AWQ, compressed-tensors or FP8 that it is",
    "bitsandbytes": "nf4, fp4 and int8",
    "expert-records": "qnext's own: an expert is one aligned record of int4, int8 or floats, the rest is any of these",
}
ALIASES = {
    "auto_round": "auto-round",
    "autoround": "auto-round",
    "intel/auto-round": "auto-round",
    "inc": "auto-round",
    "intel": "auto-round",
    "modelopt_fp8": "modelopt",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
    "gptqmodel": "gptq",
    "gptq_v2": "gptq",
    "compressed_tensors": "compressed-tensors",
    "sparseml": "compressed-tensors",
    "fbgemm-fp8": "fbgemm_fp8",
    "bnb": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
}
# quant_method -> why a folder of it is not read.
NOT_READ = {
    "aqlm": "codebooks of vectors",
    "bitnet": "ternary weights with rounded activations",
    "eetq": "codes in the order of a GPU kernel",
    "exl2": "EXL2's own files",
    "exl3": "EXL3's own files",
    "fouroversix": "FP4 with its own scales",
    "fp_quant": "FP4 behind a rotation",
    "gguf": "GGUF inside safetensors",
    "higgs": "codebooks behind a rotation",
    "hqq": "HQQ's own layout",
    "metal": "affine codes for Metal kernels",
    "mlx": "MLX's own layout",
    "mxfp4": "experts as gpt-oss stacks them",
    "nvfp4": "nothing is stored in it",
    "qqq": "two scales for each weight",
    "quanto": "quanto's own layout",
    "quark": "Quark's own layout",
    "quip": "codebooks behind a rotation",
    "sinq": "SINQ's own layout",
    "spqr": "sparse outliers",
    "torchao": "pickled tensor subclasses",
    "vptq": "codebooks of vectors",
}


class Form(NamedTuple):
    """How a weight lies on disk. `group_size` None means one group of all inputs. Only FP8 has `block`."""

    layout: str  # a name in LAYOUTS
    bits: int
    group_size: int | None = None
    is_symmetric: bool = True
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale; (0, 0): all

    @property
    def keeps_codes(self) -> bool:
        """Whether the weight stays integer codes in memory."""
        return LAYOUTS[self.layout].kind == "int"

    def stays_packed(self, *, reads_fp8: bool) -> bool:
        """Whether it stays as stored in the memory of a device, which may read fp8 with scales for blocks."""
        return self.keeps_codes or (reads_fp8 and self.layout == "fp8" and min(self.block or (0,)) > 0)

    @property
    def code_bits(self) -> int:
        """Bits of a code in memory. Other widths on disk fit into the next one of 4 and 8 without loss."""
        return 4 if self.bits <= 4 else 8

    def describe(self) -> str:
        if self.layout == "fp8":
            return f"fp8 {_block_name(self.block)}"
        if not self.keeps_codes:
            return f"{self.layout} g{self.group_size}"
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.layout} int{self.bits}-{group}"


def _block_name(block: tuple[int, int] | None) -> str:
    if block is None:
        return "of some block"
    if block == (0, 0):
        return "tensor"
    if block == (1, 0):
        return "channel"
    return f"g{block[1]}" if block[0] == 1 else f"{block[0]}x{block[1]}"


class FormClaim(NamedTuple):
    """What the configuration says about one module: its form, or None for plain, and whether it says so clearly."""

    form: Form | None
    is_certain: bool


class Rule(NamedTuple):
    """A form, or None for plain, for the modules in `targets`. `targets` None means all linear layers."""

    form: Form | None
    targets: Container[str] | None
    is_certain: bool = True


class RecordForms(NamedTuple):
    """What the records of a layer's experts hold."""

    gate_up: MatrixForm
    down: MatrixForm


class Quantization(NamedTuple):
    """A quantization_config. The first rule that names a module applies. Where it contradicts the tensors, the tensors
    decide."""

    method: str
    rules: tuple[Rule, ...]
    where: str = "config.json: quantization_config"  # file and key, for messages
    records: Mapping[str, RecordForms] = MappingProxyType({})  # of the layers whose experts are records, by name

    def claim(self, module: str, parameter: ParameterInfo) -> FormClaim:
        """The claim about a linear layer that is part of `parameter`, by its name on disk without .weight."""
        for form, targets, is_certain in self.rules:
            if targets is None:
                if parameter.kind is Kind.EMBEDDING:  # no linear layer
                    return FormClaim(None, True)
                return FormClaim(form, is_certain and not _is_doubtful(parameter, self.method))
            if module in targets:
                return FormClaim(form, is_certain)
        return FormClaim(None, self.method == "compressed-tensors")

    @property
    def forms(self) -> tuple[Form, ...]:
        return tuple(dict.fromkeys(rule.form for rule in self.rules if rule.form is not None))


def _is_doubtful(parameter: ParameterInfo, method: str) -> bool:
    """Whether programs differ on the parameter being among "every linear layer", so that the tensors decide.

    Gates are no linear layers in newer releases of transformers, quantisers do not see the MTP module, and all but
    compressed-tensors leave the head and what is outside their table of layers.
    """
    if parameter.part == "mtp" or parameter.kind in (Kind.ROUTER, Kind.SHARED_SCALE):
        return True
    return method != "compressed-tensors" and parameter.kind in (Kind.HEAD, Kind.DELTA_BA)
