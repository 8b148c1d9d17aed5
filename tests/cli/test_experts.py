"""`qnext experts`: the counts against routers that are watched, the comparison, and the pictures read back."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from qnext.checkpoint import create_folder, load_model, save_model
from qnext.checkpoint.adapters import save_adapter
from qnext.lora.adapt import adapter_of, add_lora, lora_parameters
from qnext.lora.config import LoraConfig
from qnext.model import Batch
from qnext.model.moe import Router
from qnext.text.tokenizer import Tokenizer
from tests.diagnostics.pictures import read_png

from .command import CONFIG, Capture, make_model, run

TEXT = "The delta rule forgets; attention does not. " * 4


def document(capsys: Capture, *arguments: object) -> dict[str, Any]:
    result = run(capsys, "experts", *arguments, "--json")
    assert result.code == 0, result.err
    parsed: dict[str, Any] = json.loads(result.out)
    return parsed


def counts(layers: list[dict[str, Any]]) -> list[list[int]]:
    return [layer["counts"] for layer in layers]


def watched_counts(folder: Path, token_ids: list[int]) -> list[list[int]]:
    """What the routers of the plain model choose, in one call without an engine."""
    model = load_model(folder)
    chosen: list[list[int]] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(
                lambda module, inputs, output: chosen.append(
                    torch.bincount(output.routing.experts_TA.flatten(), minlength=model.config.num_experts).tolist()
                )
            )
    with torch.inference_mode():
        model(Batch.from_lengths(torch.tensor(token_ids), [len(token_ids)]))
    return chosen


def test_counts_are_what_the_routers_choose(plain_folder: Path, capsys: Capture) -> None:
    ids = Tokenizer.from_folder(plain_folder).encode(TEXT)
    found = document(capsys, plain_folder, TEXT, "--top", "2")
    assert counts(found["layers"]) == watched_counts(plain_folder, ids)
    assert found["tokens"] == len(ids)
    for layer in found["layers"]:
        each = np.array(layer["counts"])
        share = each / each.sum()
        assert each.sum() == 2 * len(ids) == 2 * layer["tokens"]
        assert layer["entropy"] == pytest.approx(-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(4))
        assert layer["balance"] == pytest.approx(each.mean() / each.max())
        assert layer["hottest"][0] == {"expert": int(each.argmax()), "share": share.max()}
        assert layer["top_percent_share"] == share.max()  # of four experts, one
        assert (len(layer["hottest"]), layer["dead"]) == (2, np.flatnonzero(each == 0).tolist())


def test_tokens_that_follow(plain_folder: Path, capsys: Capture) -> None:
    """Text and answer are each counted once: as reading both together would."""
    ids = Tokenizer.from_folder(plain_folder).encode("Hello")
    found = document(capsys, plain_folder, "Hello", "--max-tokens", "9")
    generated = run(capsys, "generate", plain_folder, "Hello", "--max-tokens", "9", "--json")
    answer = json.loads(generated.out)["token_ids"]
    assert found["generated"] == len(answer) > 2
    assert counts(found["layers"]) == watched_counts(plain_folder, ids + answer)


def test_a_text_longer_than_the_context(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text").write_text(TEXT * 5)
    size = len(TEXT * 5)
    assert size > 3 * 256
    found = document(capsys, plain_folder, "--text", tmp_path / "text", "--max-tokens", "3")
    assert [layer["tokens"] for layer in found["layers"]] == [size + found["generated"]] * 2


def test_standard_input(plain_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    assert document(capsys, plain_folder, "-") == document(capsys, plain_folder, TEXT)


def test_the_layer_that_drafts(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    arguments = (folder, "abcdef", "--max-tokens", "40")
    plain = document(capsys, *arguments)["layers"]
    drafted = document(capsys, *arguments, "--speculation")["layers"]
    names = [str(i) for i in range(CONFIG.num_hidden_layers)]
    assert [layer["layer"] for layer in plain] == names
    assert [layer["layer"] for layer in drafted] == [*names, "MTP"]
    assert sum(drafted[-1]["counts"]) > 0


def collapsed(folder: Path, out: Path) -> Path:
    """The same model, but all tokens of layer 1 go to the same two experts."""
    model = load_model(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
    save_model(model, out, tokenizer_folder=folder)
    return out


def test_comparison(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    same = document(capsys, plain_folder, TEXT, "--compare", plain_folder, "--max-tokens", "4")
    assert counts(same["layers"]) == counts(same["compare"]["layers"])
    assert [each["distance"] for each in same["compare"]["comparison"]] == [0, 0]
    assert [each["overlap"] for each in same["compare"]["comparison"]] == [1, 1]
    assert same["compare"]["alerts"] == []
    worse = collapsed(plain_folder, tmp_path / "worse")
    result = run(capsys, "experts", plain_folder, TEXT, "--compare", worse, "--json")
    found = json.loads(result.out)
    first, second = (np.array(counts(x["layers"])[1]) / (2 * found["tokens"]) for x in (found, found["compare"]))
    assert sorted(second.tolist()) == [0, 0, 0.5, 0.5]
    change = found["compare"]["comparison"][1]
    assert change["distance"] == pytest.approx(np.abs(first - second).sum() / 2)
    assert change["newly_dead"] == np.flatnonzero(second == 0).tolist()
    assert found["compare"]["comparison"][0]["distance"] == 0  # the layer below is as it was
    (alert,) = found["compare"]["alerts"]
    assert alert.startswith("layer 1 collapses")
    assert alert in result.err


def test_two_texts(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Another text of the same kind is no drift, one of other bytes is."""
    (tmp_path / "alike").write_text(TEXT)
    (tmp_path / "digits").write_text("0123456789 " * 40)
    found = document(capsys, plain_folder, TEXT, "--against", tmp_path / "alike")["drift"]
    assert [(each["distance"], each["is_real"]) for each in found[0]["layers"]] == [(0, False)] * 2
    (found,) = document(capsys, plain_folder, TEXT, "--against", tmp_path / "digits")["drift"]
    assert found["of"] == f"the text to {tmp_path / 'digits'}"
    assert all(each["is_real"] and each["low"] <= each["distance"] for each in found["layers"])
    result = run(capsys, "experts", plain_folder, TEXT, "--against", tmp_path / "digits")
    assert "drift of the text to" in result.out and result.out.count("yes") == 2


def test_experts_that_go_together(plain_folder: Path, capsys: Capture) -> None:
    found = document(capsys, plain_folder, TEXT, "--pairs", "--top", "3")
    assert [each["layer"] for each in found["coactivation"]] == ["0", "1"]
    (step,) = found["transitions"]
    assert (step["layer"], step["next"]) == ("0", "1")
    assert 0 <= step["hit_ratio_of_the_load"] <= step["hit_ratio"] <= 1
    for pair in found["coactivation"][0]["pairs"]:
        counts_E = found["layers"][0]["counts"]
        assert 0 < pair["tokens"] <= min(counts_E[pair["first"]], counts_E[pair["second"]])
    assert "surest pairs" in run(capsys, "experts", plain_folder, TEXT, "--pairs").out


def test_the_loss_without_an_expert(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text").write_text(TEXT)
    found = document(capsys, plain_folder, TEXT, "--ablate", "top:1", "--ablate", "1:3", "--ablate-by", "zero")
    ablation = found["ablation"]
    loss = json.loads(run(capsys, "eval", plain_folder, tmp_path / "text", "--json").out)
    assert ablation["bits_per_byte"] == pytest.approx(loss["bits_per_byte"], rel=0.02)  # which has an end token too
    hottest = [layer["hottest"][0]["expert"] for layer in found["layers"]]
    named = {(each["layer"], each["expert"]) for each in ablation["experts"]}
    assert named == {("0", hottest[0]), ("1", hottest[1]), ("1", 3)}
    assert all(each["low"] <= each["effect"] <= each["high"] for each in ablation["experts"])
    result = run(capsys, "experts", plain_folder, TEXT, "--ablate", "top:3")
    assert "without an expert (the next best takes the place)" in result.out
    assert "rank correlation of mass and effect" in result.out
    result = run(capsys, "experts", tmp_path / "none", TEXT, "--ablate", "best")
    assert (result.code, "'best' names no expert" in result.error_line) == (2, True)


def test_a_baseline_and_alerts(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """The same text does not drift from its own baseline; another one does, and the exit code says so."""
    baseline, digits = tmp_path / "baseline.json", tmp_path / "digits"
    digits.write_text("0123456789 " * 60)
    document(capsys, plain_folder, TEXT, "--save-baseline", baseline)
    quiet = document(capsys, plain_folder, TEXT, "--baseline", baseline, "--alert", "drift=0.05,collapse=0.5")
    assert quiet["alerts"] == []
    result = run(capsys, "experts", plain_folder, "--text", digits, "--baseline", baseline, "--alert", "drift=0.05")
    assert result.code == 1
    lines = result.err.splitlines()
    assert lines[0].startswith("qnext experts: alert: the text: layer 0: drift is") and len(lines) == 2
    result = run(capsys, "experts", plain_folder, TEXT, "--against", digits, "--alert", "drift=0.05", "--json")
    alerts = json.loads(result.out)["alerts"]
    assert result.code == 1
    assert [(each["of"], each["layer"], each["measure"]) for each in alerts] == [
        (str(digits), 0, "drift"),
        (str(digits), 1, "drift"),
    ]
    assert all(each["value"] >= each["threshold"] == 0.05 for each in alerts)
    worse = collapsed(plain_folder, tmp_path / "worse")
    result = run(capsys, "experts", plain_folder, TEXT, "--compare", worse, "--alert", "collapse=0.2,dead=0.5")
    assert result.code == 1
    told = [line.partition(": layer ")[2].split(" is ")[0] for line in result.err.splitlines()]
    assert told == ["1: dead", "1: collapse"]
    few = run(capsys, "experts", plain_folder, "a few words", "--alert", "skew=100")
    assert (few.code, "11 tokens say little of 4 experts; 40 would" in few.err) == (0, True)
    for arguments, message in (
        (["--alert", "drift=0.1"], "drift from what?"),
        (["--alert", "heat=1"], "must be one of"),
        (["--baseline", digits], "no baseline of experts"),
    ):
        result = run(capsys, "experts", plain_folder, TEXT, *arguments)
        assert (result.code, message in result.error_line) == (2, True), result.err


def test_agreement_with_an_adapter(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """An adapter that changes nothing agrees everywhere; one that turns the routers does not."""
    model = load_model(plain_folder)
    add_lora(model, LoraConfig("attention", rank=2, router=True), seed=0)
    save_adapter(adapter_of(model), tmp_path / "none", model.config, base=str(plain_folder))
    for name, parameter in lora_parameters(model).items():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_adapter(adapter_of(model), tmp_path / "turned", model.config, base=str(plain_folder))
    same = document(capsys, plain_folder, TEXT, "--compare", tmp_path / "none")
    assert [each["overlap"] for each in same["agreement"]["layers"]] == [1, 1]
    assert same["agreement"]["worst"] == []
    other = document(capsys, plain_folder, TEXT, "--compare", tmp_path / "turned")
    for layer in other["agreement"]["layers"]:
        assert 0 <= layer["low"] <= layer["overlap"] <= layer["high"] < 1 and layer["divergence"] > 0
    assert other["agreement"]["worst"][0]["overlap"] < 1
    assert other["drift"][0]["of"] == f"the model to {tmp_path / 'turned'}"
    result = run(capsys, "experts", plain_folder, TEXT, "--compare", tmp_path / "turned")
    assert "agreement of the routers" in result.out


def test_a_table_for_people(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    result = run(capsys, "experts", plain_folder, TEXT, "--compare", collapsed(plain_folder, tmp_path / "worse"))
    header, *rows = result.out.partition("\n\n")[0].splitlines()
    assert {"layer", "tokens", "entropy", "balance", "dead", "distance", "overlap", "hottest"} < set(header.split())
    assert [row.split()[:2] for row in rows] == [["0", str(len(TEXT))], ["1", str(len(TEXT))]]


def test_usage(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    other = tmp_path / "other"
    create_folder(replace(CONFIG, num_experts=6), other, seed=0, tokenizer_folder=plain_folder)
    dense = tmp_path / "dense"
    sparse_only = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    config = replace(CONFIG, **sparse_only, shared_expert_intermediate_size=0, intermediate_size=32)
    create_folder(config, dense, seed=0, tokenizer_folder=plain_folder)
    for arguments, message in (
        ([plain_folder], "give one text"),
        ([plain_folder, "a", "--text", tmp_path / "latin"], "give one text"),
        ([plain_folder, ""], "the text is empty"),
        ([plain_folder, "--text", tmp_path / "latin"], "not UTF-8 (byte 0)"),
        ([plain_folder, "a", "--picture", "x.gif"], "pictures are .png or .svg"),
        ([plain_folder, "a", "--picture", tmp_path / "none" / "x.png"], "no such folder"),
        ([plain_folder, "a", "--compare", other], "layers, experts, chosen ones"),
        ([plain_folder, "a", "--compare", plain_folder, "--speculation"], "counts drafts too"),
        ([dense, "a"], "has no experts"),
    ):
        result = run(capsys, "experts", *arguments)
        assert (result.code, message in result.error_line) == (2, True), result.err
    result = run(capsys, "experts", plain_folder, "a", "--max-tokens", "300")
    assert result.code == 4, result.err


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_pictures_of_pairs_and_effects(plain_folder: Path, tmp_path: Path, capsys: Capture, kind: str) -> None:
    """Beside the heat map; every layer has its square and its dots."""
    asked = ("--pairs", "--ablate", "top:3", "--picture", tmp_path / f"a.{kind}")
    result = run(capsys, "experts", plain_folder, TEXT, *asked)
    written = [tmp_path / f"a{word}.{kind}" for word in ("", "-pairs", "-effects")]
    assert result.code == 0 and result.err.split() == list(map(str, written))
    if kind == "png":
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
        return
    pairs, effects = (ElementTree.parse(path).getroot() for path in written[1:])
    texts = [[text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")] for root in (pairs, effects)]
    assert {"layer 0", "layer 1"} < set(texts[0]) and {"layer 0", "layer 1"} < set(texts[1])
    cells = [each.attrib for each in pairs.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert sum(float(cell["width"]) * float(cell["height"]) for cell in cells) == pytest.approx(2 * 192 * 192, rel=0.01)
    assert len(list(effects.iter("{http://www.w3.org/2000/svg}circle"))) >= 6


@pytest.mark.parametrize("name", ["a.svg", "a.PNG"])
def test_pictures_are_written(plain_folder: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    assert run(capsys, "experts", plain_folder, TEXT, "--picture", tmp_path / name).code == 0
    data = (tmp_path / name).read_bytes()
    if name.endswith("svg"):
        assert ElementTree.fromstring(data).tag.endswith("svg")
    else:
        assert read_png(data)[0].shape == (2 * 16, 4 * 16)
