"""The names that other programs give to the same tensors. No torch.

All code behind read_index knows one name for a tensor, that of the released checkpoints. The prefix of a wrapper is
removed. Experts that lie in one tensor are seen one by one: each is a range of its bytes.

Legend: E experts, F expert width, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qnext.checkpoint.names import scale_name
from qnext.checkpoint.tensor_info import TensorInfo
from qnext.errors import CorruptCheckpoint, NotSupported

# Modules that torch puts around others: FSDP, torch.compile, activation checkpointing, data parallelism.
_AROUND = re.compile(r"(?:^module\.|(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.)")
_EMBEDDING = "embed_tokens.weight"
_HEAD = re.compile(r"(.*\.)?(?=lm_head\.)")
_MTP = re.compile(r"(.*?\.)?(?=mtp\.)")
_FUSED = re.compile(
    r"(?P<prefix>.*\.mlp\.)(?:experts|switch_mlp)\.(?P<kind>gate_up|gate|up|down)_proj(?:\.weight)?(?P<scale>_scale_inv)?"
)
# The letters that some programs give to the three projections of an expert.
_LETTERS = re.compile(r"(?P<prefix>.*\.mlp\.experts\.(?:\d+\.)?)(?P<letters>w13|w[123])(?:_weight|\.weight)?")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "w13": "gate_up_proj"}
# Gate and up of one feed-forward network or expert in one matrix.
_PAIR = re.compile(r"(.*\.mlp\.(?:experts\.\d+\.|shared_expert\.)?)gate_up_proj\.weight")
_PLAIN_DTYPES = ("BF16", "F16", "F32")
_MAX_EXPERTS = 1 << 16
_BLOCK = 128  # of FP8 scales

# For a list of what is read: how experts may lie on disk.
EXPERT_FORMS = {
    "experts.N.gate_proj.weight [F, D]": "one tensor per expert and projection, as released",
    "experts.gate_up_proj [E, 2F, D]": "all experts in one tensor, as transformers 5 keeps them in memory",
    "experts.N.gate_up_proj.weight [2F, D]": "gate and up of one expert together; of a dense layer likewise",
    "experts.N.w1.weight, experts.w13_weight": "w1 for gate, w2 for down, w3 for up",
    "switch_mlp.gate_proj.weight [E, F, D]": "one tensor per projection, as mlx-lm writes them unquantised",
}


def canonical(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors under the names of the released checkpoints. Tensors that belong elsewhere keep their names.

    Raises CorruptCheckpoint where two tensors get one name, NotSupported for experts that are stored transposed.
    """
    renamed: dict[str, TensorInfo] = {}
    origin: dict[str, TensorInfo] = {}
    names = _without_prefixes(tensors)
    hidden = next((infos.shape[-1] for name, infos in names if name == f"model.{_EMBEDDING}" and infos.shape), None)
    widths = {name: info.shape[1] for name, info in names if info.dtype == "F8_E4M3" and len(info.shape) == 3}
    for name, info in names:
        is_together = len(info.shape) == 3 or name.endswith("gate_up_proj.weight")
        own = info if name == info.name else info._replace(name=name)
        for each in _experts(own, hidden, widths) if is_together else (own,):
            if each.name in renamed:
                other = origin[each.name].name
                raise CorruptCheckpoint(f"{info.file}: tensors {other} and {info.name} are both {each.name}")
            renamed[each.name] = each
            origin[each.name] = info
    return renamed


def _without_prefixes(tensors: dict[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    names = {name: _unwrapped(name) for name in tensors}
    heads = {match[1] or "" for name in names.values() if "lm_head." in name and (match := _HEAD.match(name))}
    names = {name: _in_words(other) for name, other in names.items()}
    drafters = {match[1] or "" for name in names.values() if "mtp." in name and (match := _MTP.match(name))}
    trunk = _trunk_prefix(set(names.values()))
    head = heads.pop() if len(heads) == 1 else ""
    drafter = drafters.pop() if len(drafters) == 1 else ""

    def rename(name: str) -> str:
        if drafter and name.startswith(f"{drafter}mtp."):
            return name[len(drafter) :]
        if head and name.startswith(f"{head}lm_head."):
            return name[len(head) :]
        if trunk == "" and name.startswith(("layers.", "embed_tokens.", "norm.")):
            return f"model.{name}"
        if trunk and trunk != "model." and name.startswith(trunk) and not name.startswith(("mtp.", "lm_head.")):
            return f"model.{name[len(trunk) :]}"
        return name

    return [(rename(names[name]), info) for name, info in tensors.items()]


def _unwrapped(name: str) -> str:
    is_around = name.startswith(("module.", "_")) or "._" in name
    return _AROUND.sub("", name) if is_around else name


def _in_words(name: str) -> str:
    """Projections by their names instead of letters."""
    match = _LETTERS.fullmatch(name) if ".w" in name else None
    if match is None:
        return name
    return f"{match['prefix']}{_PROJECTIONS[match['letters']]}.weight"


def _trunk_prefix(names: set[str]) -> str | None:
    """What stands before embed_tokens, norm and layers; None where that is not clear."""
    found = [name[: -len(_EMBEDDING)] for name in names if name.endswith(_EMBEDDING)]
    trunks = [prefix for prefix in found if f"{prefix}norm.weight" in names and "mtp." not in prefix]
    if "model." in trunks or len(trunks) != 1:
        return None
    return trunks[0] if trunks[0] == "" or trunks[0].endswith(".") else None


def _experts(info: TensorInfo, hidden: int | None, widths: dict[str, int]) -> Iterator[TensorInfo]:
    """The tensor itself, or each expert's part of it."""
    pair = _PAIR.fullmatch(info.name)
    if pair is not None and len(info.shape) == 2 and info.dtype in _PLAIN_DTYPES and info.shape[0] % 2 == 0:
        middle = (info.start + info.end) // 2
        shape = (info.shape[0] // 2, info.shape[1])
        yield TensorInfo(f"{pair[1]}gate_proj.weight", info.dtype, shape, info.file, info.start, middle)
        yield TensorInfo(f"{pair[1]}up_proj.weight", info.dtype, shape, info.file, middle, info.end)
        return
    match = _FUSED.fullmatch(info.name)
    if match is None or len(info.shape) != 3 or not info.num_bytes or info.shape[0] > _MAX_EXPERTS:
        yield info
        return
    prefix, kind, is_scale = f"{match['prefix']}experts.", match["kind"], bool(match["scale"])
    num_experts, rows, columns = info.shape
    halves = ("gate", "up") if kind == "gate_up" else (kind,)
    if not is_scale:
        inputs, outputs = (rows, columns) if kind == "down" else (columns, rows)
        if hidden is not None and inputs != hidden and outputs == hidden:
            raise NotSupported(
                f"{info.file}: tensor {info.name} of shape {list(info.shape)} holds experts transposed, inputs first; "
                "only outputs first is supported"
            )
    of_weight = widths.get(info.name.removesuffix("_scale_inv"), 0) if is_scale else 0
    if len(halves) == 2 and not _parts_in_two(rows, of_weight):
        raise NotSupported(f"{info.file}: tensor {info.name}: its {rows} rows do not part between gate and up")
    size = info.num_bytes // num_experts // len(halves)
    for expert in range(num_experts):
        for i, half in enumerate(halves):
            start = info.start + (expert * len(halves) + i) * size
            name = f"{prefix}{expert}.{half}_proj.weight"
            shape = (rows // len(halves), columns)
            yield TensorInfo(scale_name(name) if is_scale else name, info.dtype, shape, info.file, start, start + size)


def _parts_in_two(rows: int, of_weight: int) -> bool:
    """Whether rows are gate's, then up's. Scales, whose weight has `of_weight` rows, must not share a block."""
    if not of_weight:
        return rows % 2 == 0
    blocks = -(-(of_weight // 2) // _BLOCK)  # of each half
    return rows == 2 * blocks and (of_weight % (2 * _BLOCK) == 0 or rows != -(-of_weight // _BLOCK))
