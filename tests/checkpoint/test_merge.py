"""A merged folder: W + scale B A in the form of W, and everything else byte by byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.checkpoint import load_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.merge import MergeReport, merge_folder
from qnext.checkpoint.quantize import quantize_folder
from qnext.checkpoint.rewrite import rewrite_folder
from qnext.checkpoint.values import read_weight
from qnext.config import ModelConfig
from qnext.errors import NotSupported, UsageError
from qnext.lora import Adapter, LoraConfig, adapter_of, attach
from qnext.model import CausalLM
from qnext.ops import LowRank
from qnext.quant.scheme import make_policy
from tests.lora.models import outputs_of, with_random_lora
from tests.model.models import logits_of, random_tokens
from tests.ops.compare import relative_rms

from .float_folders import float_folder, float_forms
from .folders import read_tensors, rewrite
from .packed_folders import PackedForm, packed_folder
from .quantized import NEXT, save_random

LORA = LoraConfig("all", rank=4, shares_outer=False)
EXPERTS = {0: (0, 3), 1: (1,), 4: (2, 4)}


def keep_scalars_wide(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith(("A_log", "linear_attn.norm.weight")):
            tensors[name] = tensors[name].float()


# In tests/checkpoint/float_folders.py.
FP8 = {
    "fp8": "official",
    "fp8, powers of two": "official, powers of two",
    "fp8, one scale": "one scale, static",
    "fp8, vectors": "FP8 of vectors",
    "fp8, e5m2": "E5M2",
}


def make_base(form: str, folder: Path) -> Path:
    if form in FP8:
        float_folder(folder, float_forms()[FP8[form]])
        return folder
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    plain = save_random(folder.with_name("plain") if form == "int4" else folder, NEXT, dtype=dtype)
    if form == "bfloat16":
        rewrite(plain, keep_scalars_wide)
    if form == "int4":
        quantize_folder(plain, folder, policy=make_policy("int4-g32", head=None, is_tied=False))
    return folder


def random_adapter(config: ModelConfig) -> Adapter:
    """Of a model of its own, since only the factors are wanted."""
    model = CausalLM(config)
    experts = {layer: tuple(e for e in chosen if e < config.num_experts) for layer, chosen in EXPERTS.items()}
    return adapter_of(with_random_lora(model, replace(LORA, experts=experts)))


def numbers(folder: Path) -> dict[str, Tensor]:
    """Every weight in fp32, by its name on disk."""
    layout = read_layout(folder)
    with TensorFiles(layout.index) as files:
        return {name: read_weight(layout, files, name, dtype=torch.float32) for name in layout.targets}


# Relative to the weights: fp32 rounds a sum once, bf16 to 8 bits, e4m3 to 4 bits, e5m2 to 3, int4 to a sixteenth of a
# group.
TOLERANCES = {"float32": 1e-7, "bfloat16": 2e-3, "int4": 1.5e-1, **dict.fromkeys(FP8, 3e-2), "fp8, e5m2": 6e-2}


@pytest.mark.parametrize("form", list(TOLERANCES))
@torch.no_grad()
def test_what_changes_and_what_stays(form: str, tmp_path: Path) -> None:
    base = make_base(form, tmp_path / "base")
    layout = read_layout(base)
    adapter = random_adapter(layout.config)
    report = merge_folder(layout, adapter, tmp_path / "out")
    merged = read_layout(tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    specs = [{name: (t.dtype, t.shape) for name, t in tensors.items()} for tensors in (before, after)]
    assert specs[0] == specs[1]
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    changed: set[str] = set()
    plain, found = numbers(base), numbers(tmp_path / "out")
    for name, (parameter, part) in layout.targets.items():
        delta = adapter.delta(parameter.name, part.expert)
        if delta is None:
            continue
        changed.update(layout.stored_names(name))
        delta = delta if part.rows is None else delta[slice(*part.rows)]
        wanted = plain[name] + delta
        if name not in layout.packed:
            assert torch.equal(found[name], wanted.to(after[name].dtype).float()), name
        assert relative_rms(found[name], wanted) <= TOLERANCES[form], name
        assert relative_rms(plain[name], wanted) > 0.2, name
        assert merged.packed.keys() == layout.packed.keys()
    assert changed
    assert any(name.startswith("mtp.layers.0.mlp.experts.2.") for name in changed)
    assert not any(".experts.1." in name and "layers.0." in name for name in changed)
    for name in before.keys() - changed:
        assert torch.equal(before[name].reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name
    assert report.num_copied == len(before) - len(changed)
    check_report(report, form)


def check_report(report: MergeReport, form: str) -> None:
    lines = "\n".join(report.lines())
    assert ("rounded again" in lines) == (form not in ("float32", "bfloat16"))
    assert all(error.of_change > error.of_error for error in report.errors.values())


@torch.no_grad()
def test_merged_computes_as_adapted(tmp_path: Path) -> None:
    base = make_base("float32", tmp_path / "base")
    adapted = load_model(base)
    adapter = random_adapter(adapted.config)
    attach(adapted, adapter)
    merge_folder(base, adapter, tmp_path / "out")
    assert relative_rms(outputs_of(load_model(tmp_path / "out")), outputs_of(adapted)) <= 1e-5


def test_transformers_reads_a_merged_folder(tmp_path: Path) -> None:
    import transformers

    base = make_base("bfloat16", tmp_path / "base")
    merge_folder(base, random_adapter(NEXT), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = random_tokens(NEXT, 20)
    with torch.no_grad():
        ours = logits_of(load_model(tmp_path / "out", dtype=torch.float32), tokens)
        assert relative_rms(ours, theirs(tokens[None]).logits[0]) <= 3e-5


def test_experts_without_change_keep_their_codes(tmp_path: Path) -> None:
    """A factor of zero is no change: rounding numbers again that were rounded would change codes."""
    base = make_base("int4", tmp_path / "base")
    adapter = random_adapter(NEXT)
    for name, part in adapter.parts.items():
        if not name.endswith("0.mlp.experts.down_proj"):
            part.B.zero_()
    adapter.parts["model.layers.0.mlp.experts.down_proj"].A[1].zero_()
    merge_folder(base, adapter, tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    wanted = ["model.layers.0.mlp.experts.0", "mtp.layers.0.mlp.experts.2", "mtp.layers.0.mlp.experts.4"]
    assert changed == {f"{expert}.down_proj" for expert in wanted}


def test_records_are_refused(tmp_path: Path) -> None:
    base = make_base("int4", tmp_path / "base")
    rewrite_folder(base, tmp_path / "records", with_records=True)
    with pytest.raises(NotSupported, match=r"qnext convert .*records OUT"):
        merge_folder(tmp_path / "records", random_adapter(NEXT), tmp_path / "out")


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    base = make_base("float32", tmp_path / "base")
    with pytest.raises(UsageError, match="never adapted"):
        part = LowRank(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
        merge_folder(base, Adapter({"model.layers.7.x.weight": part}), tmp_path / "out")
    other = random_adapter(replace(NEXT, moe_intermediate_size=64))
    with pytest.raises(UsageError, match="another model"):
        merge_folder(base, other, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        merge_folder(base, random_adapter(NEXT), base)
    packed_folder(tmp_path / "awq", PackedForm("awq", "awq", 4, 16, False))
    layout = read_layout(tmp_path / "awq")
    with pytest.raises(NotSupported, match=r"awq.*quantise"):
        merge_folder(layout, random_adapter(layout.config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
