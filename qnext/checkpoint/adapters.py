"""Adapters on disk in PEFT's form: adapter_config.json and adapter_model.safetensors.

Names and layouts are those of PEFT 0.21 (tuners/lora/layer.py: Linear, ParamWrapper). The factors of all experts lie in
two matrices: A is [E * R, D], one expert after another; B is [F, R * E], in which a rank's columns are those of the
experts. Of two stacks of one module down_proj is outside, and gate_up_proj belongs to its `base_layer`.

Legend: D inputs, F outputs, E experts, K adapted experts, R rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext import files
from qnext.checkpoint.files import write_tensors
from qnext.checkpoint.finite import is_finite
from qnext.checkpoint.header import load_json
from qnext.checkpoint.provenance import Making
from qnext.checkpoint.reading import read_tensors
from qnext.checkpoint.save import write_side_files
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, UsageError
from qnext.lora import Adapter
from qnext.lora.config import ADAPTABLE
from qnext.ops import LowRank
from qnext.planning import Kind, ParameterInfo, list_parameters

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
IN_A_RUN = "adapter"  # the folder of a run that holds its adapter
_PREFIX = "base_model.model."
_STACKS = {Kind.EXPERTS_GATE_UP, Kind.EXPERTS_DOWN}
# Parameters that PEFT changes as parameters. It takes the names of dense projections for those of experts, of which
# they were the names in transformers 4, so those of a shared expert can be changed in no other way.
_AS_PARAMETERS = _STACKS | {Kind.ROUTER, Kind.SHARED_GATE, Kind.SHARED_UP, Kind.SHARED_DOWN}
# key -> the values with which it has no effect
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


class AdapterFolder(NamedTuple):
    """What a folder says of its adapter: its configuration, the tensors by name."""

    folder: Path
    values: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def base(self) -> str | None:
        """The model that the adapter was trained on."""
        name = self.values.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def find_adapter(source: str | Path) -> Path:
    """The folder of an adapter, or that of the adapter in the folder of a run. Raises ModelNotFound."""
    path = Path(source)
    for folder in (path, path / IN_A_RUN):
        if is_adapter(folder):
            return folder
    raise ModelNotFound(f"{path}: {'no adapter there' if path.is_dir() else 'no such folder'}")


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    config: ModelConfig,
    *,
    base: str | None,
    tokenizer_folder: Path | None = None,
    overwrite: bool = False,
    making: Making | None = None,
) -> None:
    """Write a folder that PEFT reads, and that read_adapter makes the same adapter of, but for shared factors. The
    tokenizer and the chat template that it was trained with stand beside it.

    PEFT has no shared factors, so these are repeated for each expert. Experts without factors get zeros. What belongs
    to the MTP layer lies in the same file; transformers has no such layer and passes it over. Raises UsageError for a
    folder that is not empty, unless `overwrite` is set and it holds an adapter.
    """
    path = Path(folder)
    if path.exists() and any(path.iterdir()) and not (overwrite and is_adapter(path)):
        raise UsageError(f"{path}: exists and is not empty")
    infos = list_parameters(config)
    tensors: dict[str, Tensor] = {}
    for name, part in adapter.parts.items():
        a, b = part.A, part.B
        if infos[name].expert_axis is not None:
            a, b = _all_experts(infos[name], part, adapter.places.get(name.rpartition(".")[0]))
        place = _PREFIX + _module_of(infos[name], adapter.parts)
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = a.contiguous(), b.contiguous()
    with files.new_folder(path) as made:
        text = json.dumps(_config(adapter, infos, base), indent=2) + "\n"
        files.write_inside(made / CONFIG_FILE, text)
        write_tensors(made / TENSOR_FILE, tensors)
        if tokenizer_folder is not None:
            write_side_files(made, config, tokenizer_folder, None)
        if making is not None:
            making.write_inside(made)


def _module_of(info: ParameterInfo, adapted: Mapping[str, Any]) -> str:
    """The module to whose name PEFT adds lora_A and lora_B."""
    module = info.name.rpartition(".")[0]
    is_inside = info.kind is Kind.EXPERTS_GATE_UP and f"{module}.down_proj" in adapted
    return f"{module}.base_layer" if is_inside else module


def _all_experts(info: ParameterInfo, part: LowRank, places_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [E * R, D] and B [F, R * E]"""
    num_experts, (outputs, inputs) = info.shape[0], info.block_shape
    rank = part.A.shape[1]
    a = part.A.new_zeros(num_experts, rank, inputs)
    b = part.B.new_zeros(num_experts, outputs, rank)
    if places_E is None:
        a[:], b[:] = part.A, part.B
    else:
        adapted_K = (places_E >= 0).nonzero().squeeze(1)
        a[adapted_K], b[adapted_K] = part.A.expand(len(adapted_K), -1, -1), part.B.expand(len(adapted_K), -1, -1)
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _config(adapter: Adapter, infos: Mapping[str, ParameterInfo], base: str | None) -> dict[str, Any]:
    ranks = {name: part.A.shape[-2] for name, part in adapter.parts.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common()
    alphas = {name: part.scale * ranks[name] for name, part in adapter.parts.items()}
    (alpha, _), *_ = Counter(alphas[name] for name in ranks if ranks[name] == rank).most_common()
    trunk = {name: info for name, info in infos.items() if info.part != "mtp"}
    targets = _targets([name for name in adapter.parts if name in trunk], trunk)
    modules = {target for name, target in targets.items() if infos[name].kind not in _AS_PARAMETERS}
    rank_pattern = {targets[name]: ranks[name] for name in targets if ranks[name] != rank}
    alpha_pattern = {targets[name]: alphas[name] for name in targets if alphas[name] != alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(modules),
        "target_parameters": sorted(set(targets.values()) - modules),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _targets(names: list[str], infos: Mapping[str, ParameterInfo]) -> dict[str, str]:
    """What PEFT is to look for: the end of a name where it says the same of all layers, otherwise the whole name."""

    def target(name: str, *, is_short: bool) -> str:
        is_parameter = infos[name].kind in _AS_PARAMETERS
        own = name if is_parameter else name.removesuffix(".weight")
        return own.split(".", 3)[3] if is_short else own

    by_end: dict[str, list[str]] = {}
    for name in infos:
        if infos[name].kind in ADAPTABLE:
            by_end.setdefault(target(name, is_short=True), []).append(name)
    wanted = set(names)
    complete = {name for group in by_end.values() if wanted.issuperset(group) for name in group}
    return {name: target(name, is_short=name in complete) for name in names}


def open_adapter(folder: str | Path) -> AdapterFolder:
    """Read a folder. Raises ModelNotFound, CorruptCheckpoint naming the file, NotSupported for another kind of
    adapter."""
    path = Path(folder)
    config = path / CONFIG_FILE
    if not config.is_file():
        raise ModelNotFound(f"{config}: no such file")
    values = load_json(config.read_bytes(), config)
    if values.get("peft_type") != "LORA":
        raise NotSupported(f"{config}: peft_type: {values.get('peft_type')!r} is not read, only LORA")
    for key, neutral in NEUTRAL.items():
        if values.get(key) not in neutral:
            raise NotSupported(f"{config}: {key}: {values[key]!r} is not supported")
    if not (path / TENSOR_FILE).is_file():
        raise CorruptCheckpoint(f"{path / TENSOR_FILE}: missing")
    tensors = read_tensors(path / TENSOR_FILE)
    return AdapterFolder(path, values, tensors)


def read_adapter(source: str | Path | AdapterFolder, config: ModelConfig) -> Adapter:
    """The adapter of a folder for a model. Factors that all experts have are kept once, and none for experts whose
    change is zero.

    Raises the errors of open_adapter, and CorruptCheckpoint naming a tensor that the model has no place for, that does
    not fit, or that is not finite.
    """
    found = source if isinstance(source, AdapterFolder) else open_adapter(source)
    file = found.folder / TENSOR_FILE
    scales = _Scales(found)
    left = {name.replace(".default.weight", ".weight"): tensor for name, tensor in found.tensors.items()}
    parts: dict[str, LowRank] = {}
    places: dict[str, Tensor] = {}
    infos = list_parameters(config)
    for name, info in infos.items():
        if info.kind not in ADAPTABLE:
            continue
        pair = _take_pair(left, info)
        if pair is None:
            each = _take_experts(left, info, file)
            if each is not None:
                parts[name] = each._replace(scale=scales.of(info, int(each.scale)))
            continue
        a, b = pair
        for factor in pair:
            if not factor.is_floating_point() or not is_finite(factor):
                raise CorruptCheckpoint(f"{file}: a factor of {name} is not finite")
        rank = a.shape[0] // (info.shape[0] if info.expert_axis is not None else 1)
        _check_shapes(info, a, b, rank, file)
        scale = scales.of(info, rank)
        parts[name] = LowRank(a, b, scale)
        if info.expert_axis is not None:
            num_experts = info.shape[0]
            stacked = b.unflatten(1, (rank, num_experts)).permute(2, 0, 1).contiguous()
            parts[name] = LowRank(a.unflatten(0, (num_experts, rank)), stacked, scale)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CorruptCheckpoint(f"{file}: tensor {min(left)}{more}: the model has no such matrix to change")
    if not parts:
        raise CorruptCheckpoint(f"{file}: holds no factors")
    for module in {name.rpartition(".")[0] for name, info in infos.items() if name in parts and info.expert_axis == 0}:
        places |= _compact(module, parts)
    return Adapter(parts, places)


def _take_pair(left: dict[str, Tensor], info: ParameterInfo) -> tuple[Tensor, Tensor] | None:
    """Both factors of a parameter. Those of a single stack lie where those of the outer one would lie."""
    module = info.name.rpartition(".")[0]
    places = [module]
    if info.kind is Kind.EXPERTS_GATE_UP:
        places = [f"{module}.base_layer", module]
    for place in places:
        keys = [f"{_PREFIX}{place}.lora_{letter}.weight" for letter in "AB"]
        if any(key not in left for key in keys):
            continue
        if info.kind in _STACKS and (left[keys[0]].shape[-1], left[keys[1]].shape[0]) != info.block_shape[::-1]:
            continue
        return left.pop(keys[0]), left.pop(keys[1])
    return None


def _take_experts(left: dict[str, Tensor], info: ParameterInfo, file: Path) -> LowRank | None:
    """The factors of a stack whose experts have pairs of their own, as with transformers 4; their rank as the scale.

    Those of gate and up stand one below the other in A, and in B as two blocks. What an expert lacks is zero.
    """
    if info.expert_axis is None:
        return None
    module, (outputs, inputs) = info.name.rpartition(".")[0], info.block_shape
    halves = ("gate", "up") if info.kind is Kind.EXPERTS_GATE_UP else ("down",)
    keys = {
        (e, i): [f"{_PREFIX}{module}.{e}.{half}_proj.lora_{letter}.weight" for letter in "AB"]
        for e in range(info.shape[0])
        for i, half in enumerate(halves)
    }
    found = {place: pair for place, pair in keys.items() if all(key in left for key in pair)}
    if not found:
        return None
    rank, rows = left[next(iter(found.values()))[0]].shape[0], outputs // len(halves)
    a = torch.zeros(info.shape[0], rank * len(halves), inputs)
    b = torch.zeros(info.shape[0], outputs, rank * len(halves))
    for (expert, i), pair in found.items():
        own_a, own_b = (left.pop(key) for key in pair)
        if own_a.shape != (rank, inputs) or own_b.shape != (rows, rank):
            raise CorruptCheckpoint(f"{file}: tensor {pair[0]} and its B do not fit {info.name} {list(info.shape)}")
        if not is_finite(own_a) or not is_finite(own_b):
            raise CorruptCheckpoint(f"{file}: tensor {pair[0]} or its B is not finite")
        a[expert, i * rank : (i + 1) * rank] = own_a
        b[expert, i * rows : (i + 1) * rows, i * rank : (i + 1) * rank] = own_b
    return LowRank(a, b, float(rank))


def _check_shapes(info: ParameterInfo, a: Tensor, b: Tensor, rank: int, file: Path) -> None:
    outputs, inputs = info.block_shape
    count = info.shape[0] if info.expert_axis is not None else 1
    if rank < 1 or a.shape != (rank * count, inputs) or b.shape != (outputs, rank * count):
        raise CorruptCheckpoint(
            f"{file}: factors {list(a.shape)} and {list(b.shape)} do not fit {info.name} {list(info.shape)}"
        )


def _compact(module: str, parts: dict[str, LowRank]) -> dict[str, Tensor]:
    """Leave out experts that nothing changes, and keep factors once that are the same for all others."""
    names = [name for name in (f"{module}.gate_up_proj", f"{module}.down_proj") if name in parts]
    is_changed_E = torch.stack(
        [parts[name].A.flatten(1).any(1) & parts[name].B.flatten(1).any(1) for name in names]
    ).any(0)
    if not is_changed_E.any():
        is_changed_E[0] = True  # an adapter without effect is told elsewhere
    chosen_K = is_changed_E.nonzero().squeeze(1)
    for name in names:
        a, b = parts[name].A[chosen_K], parts[name].B[chosen_K]
        if name.endswith("gate_up_proj") and bool((a == a[:1]).all()):
            a = a[:1].clone()
        if name.endswith("down_proj") and bool((b == b[:1]).all()):
            b = b[:1].clone()
        parts[name] = LowRank(a, b, parts[name].scale)
    if bool(is_changed_E.all()):
        return {}
    places_E = torch.full((len(is_changed_E),), -1)
    places_E[chosen_K] = torch.arange(len(chosen_K))
    return {module: places_E}


class _Scales:
    """alpha / rank of each parameter, as PEFT finds it: by the first pattern that ends its name."""

    def __init__(self, found: AdapterFolder) -> None:
        values, self._path = found.values, found.folder / CONFIG_FILE
        self._alpha = self._number(values.get("lora_alpha", 8), "lora_alpha")
        self._patterns = values.get("alpha_pattern") or {}
        self._is_rooted = values.get("use_rslora") is True
        if not isinstance(self._patterns, dict):
            raise CorruptCheckpoint(f"{self._path}: alpha_pattern is no object")

    def _number(self, value: Any, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
            raise CorruptCheckpoint(f"{self._path}: {key}: {value!r} is no positive number")
        return float(value)

    def of(self, info: ParameterInfo, rank: int) -> float:
        ends = [info.name, info.name.removesuffix(".weight")]
        alpha = self._alpha
        for pattern, value in self._patterns.items():
            plain = pattern.removeprefix(r".*\.").replace("\\.", ".").lstrip("^")
            if any(end == plain or end.endswith(f".{plain}") for end in ends):
                alpha = self._number(value, f"alpha_pattern.{pattern}")
                break
        return alpha / (rank**0.5 if self._is_rooted else rank)
