"""Folders quantised layer by layer, against whole models and against compressed-tensors and transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.checkpoint.calibrate import TextSample
from qnext.checkpoint.names import expected_tensors
from qnext.checkpoint.quantize import quantize_folder
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint, DoesNotFit, UsageError
from qnext.eval import EvalDocument, evaluate_perplexity
from qnext.model import Batch
from qnext.quant.report import QualityReport
from qnext.quant.scheme import make_policy
from tests.checkpoint.folders import make_fp8, poke
from tests.checkpoint.packed_folders import FORMS, PackedForm, packed_folder
from tests.checkpoint.quantized import DENSE, NEXT, model_of, save_random, stored_weights

KEPT = ("norm", "mlp.gate.", "shared_expert_gate", "in_proj_ba", "conv1d", "A_log", "dt_bias", "embed_tokens", "mtp.fc")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are tiny: a second thread only waits."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("quantize") / "next", NEXT)


def sequences(count: int, length: int, *, seed: int, vocab_size: int = NEXT.vocab_size) -> list[Tensor]:
    """Token ids in which some follow others: routers and convolutions see structure."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(vocab_size, (count, 1), generator=generator)
    steps = torch.randint(1, 4, (count, length), generator=generator).cumsum(1)
    return list((starts + steps) % vocab_size)


SAMPLE = TextSample(sequences(12, 60, seed=1), [*sequences(3, 50, seed=2), *sequences(1, 21, seed=3)])


def quantize(
    source: Path,
    out: Path,
    config: ModelConfig = NEXT,
    *,
    scheme: str = "int4-g32",
    head: str | None = None,
    **kwargs: Any,
) -> QualityReport:
    policy = make_policy(scheme, head=head, is_tied=config.tie_word_embeddings)
    return quantize_folder(source, out, policy=policy, **kwargs)


@pytest.fixture(scope="module")
def calibrated(source: Path) -> tuple[Path, QualityReport]:
    out = source.parent / "calibrated"
    return out, quantize(source, out, sample=SAMPLE)


@pytest.mark.parametrize("sample", [None, SAMPLE], ids=["nearest", "calibrated"])
def test_every_tensor_is_there_kept_or_close(source: Path, tmp_path: Path, sample: TextSample | None) -> None:
    quantize(source, tmp_path / "out", sample=sample, max_shard_bytes=100_000)
    original, rounded = stored_weights(source), stored_weights(tmp_path / "out")
    assert original.keys() == rounded.keys() == expected_tensors(NEXT).keys()
    for name, weight in original.items():
        error = float((rounded[name].float() - weight).norm() / weight.norm())
        if any(mark in name for mark in KEPT):
            assert torch.equal(rounded[name], weight), name
        else:
            assert 0 < error < (0.01 if name == "lm_head.weight" else 0.25), name


def perplexity(folder: Path, pieces: list[Tensor]) -> float:
    documents = [EvalDocument(ids.tolist(), 1) for ids in pieces]
    return math.exp(evaluate_perplexity(model_of(folder, NEXT), documents, sequence_length=1000).nats_per_token)


def test_layer_by_layer_equals_the_whole_model(source: Path, calibrated: tuple[Path, QualityReport]) -> None:
    """Both streams of the report against models that are in memory as a whole."""
    out, report = calibrated
    assert report.text is not None
    assert report.text.num_tokens == sum(len(ids) - 1 for ids in SAMPLE.evaluation)
    assert report.text.perplexity_original == pytest.approx(perplexity(source, list(SAMPLE.evaluation)), rel=1e-4)
    assert report.text.perplexity_quantized == pytest.approx(perplexity(out, list(SAMPLE.evaluation)), rel=1e-4)


def test_report_equals_two_models_side_by_side(source: Path, calibrated: tuple[Path, QualityReport]) -> None:
    out, report = calibrated
    models = [model_of(folder, NEXT) for folder in (source, out)]
    kl, overlap, count = 0.0, [0] * NEXT.num_hidden_layers, 0
    with torch.no_grad():
        for ids in SAMPLE.evaluation:
            choices: list[list[Tensor]] = [[], []]
            logits = []
            for model, chosen in zip(models, choices, strict=True):
                hooks = [
                    layer.mlp.gate.register_forward_hook(lambda m, i, o, c=chosen: c.append(o.routing.experts_TA))
                    for layer in model.model.layers
                ]
                trunk = model(Batch.from_lengths(ids[:-1], [len(ids) - 1]))
                logits.append(model.logits(trunk.hidden_TD).log_softmax(-1))
                for hook in hooks:
                    hook.remove()
            kl += float((logits[0].exp() * (logits[0] - logits[1])).sum())
            count += len(ids) - 1
            for layer, (before, after) in enumerate(zip(*choices, strict=True)):
                pairs = zip(before.tolist(), after.tolist(), strict=True)
                overlap[layer] += sum(len(set(one) & set(other)) for one, other in pairs)
    assert report.text is not None
    assert report.text.kl_mean == pytest.approx(kl / count, rel=2e-2)
    expected = [kept / count / NEXT.num_experts_per_tok for kept in overlap]
    assert [router.overlap for router in report.text.routers] == pytest.approx(expected, abs=0.01)


def test_calibration_keeps_outputs_better_than_nearest(tmp_path: Path) -> None:
    """Every token goes to all experts: in a random model routers are near ties, and their flips drown the rest."""
    config = replace(NEXT, num_experts_per_tok=NEXT.num_experts)
    source = save_random(tmp_path / "source", config, embedding_rank=8)
    sample = TextSample(sequences(30, 60, seed=1), sequences(10, 60, seed=2))
    calibrated = quantize(source, tmp_path / "calibrated", config, sample=sample)
    nearest = quantize(source, tmp_path / "nearest", config, sample=sample, is_calibrated=False)
    assert (calibrated.method, nearest.method) == ("gptq", "nearest")
    assert calibrated.text is not None and nearest.text is not None
    assert calibrated.text.kl_mean < 0.7 * nearest.text.kl_mean


def test_measuring_changes_no_code(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "measured", sample=SAMPLE, is_calibrated=False)
    assert quantize(source, tmp_path / "plain").text is None
    one, other = stored_weights(tmp_path / "measured"), stored_weights(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_expert_that_no_token_reaches_is_rounded_by_the_rest(source: Path, tmp_path: Path) -> None:
    few = TextSample(sequences(1, 3, seed=4), [])
    report = quantize(source, tmp_path / "few", sample=few)
    assert report.text is None
    assert all(math.isfinite(error.weight_error) and error.weight_error < 0.6 for error in report.worst)


def test_errors_in_the_report_are_those_of_the_files(source: Path, calibrated: tuple[Path, QualityReport]) -> None:
    out, report = calibrated
    original, rounded = stored_weights(source), stored_weights(out)
    for error in report.worst:
        expected = (rounded[error.name] - original[error.name]).norm() / original[error.name].norm()
        assert error.weight_error == pytest.approx(float(expected), rel=1e-3)
    assert sum(kind.num_tensors for kind in report.kinds) == sum(
        "_packed" not in n and _is_rounded(n) for n in original
    )
    assert json.loads(json.dumps(report.to_json()))["text"]["num_tokens"] == report.text.num_tokens  # type: ignore[union-attr]
    assert f"{report.text.perplexity_quantized:.4f}" in report.table()  # type: ignore[union-attr]


def _is_rounded(name: str) -> bool:
    return not any(mark in name for mark in KEPT)


def test_config_describes_the_folder(calibrated: tuple[Path, QualityReport]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    match = pytest.importorskip("compressed_tensors.utils.match")
    out, _ = calibrated
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate({**block, "ignore": block["ignore"]})
    assert config.format == "pack-quantized"
    names = expected_tensors(NEXT)
    packed = {name for name in stored_weights(out) if _is_rounded(name)}
    linear = torch.nn.Linear(1, 1)
    for name, shape in names.items():
        if len(shape) != 2 or name == "model.embed_tokens.weight":
            continue
        module = name.removesuffix(".weight")
        is_ignored = any(match.is_match(module, linear, pattern) for pattern in config.ignore)
        assert is_ignored == (name not in packed), name
    bits = {group.targets[0]: group.weights.num_bits for group in config.config_groups.values()}
    assert bits == {"Linear": 4, "lm_head": 8}


def test_transformers_reads_a_dense_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = save_random(tmp_path / "dense", DENSE)
    quantize(source, tmp_path / "out", DENSE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(30) * 7 % DENSE.vocab_size
    with torch.no_grad():
        ours = model_of(tmp_path / "out", DENSE)
        logits = ours.logits(ours(Batch.from_lengths(ids, [30])).hidden_TD)
        torch.testing.assert_close(theirs(ids[None]).logits[0], logits, rtol=1e-3, atol=1e-4)


def test_fp8_source(source: Path, tmp_path: Path) -> None:
    """Rounded from the numbers that FP8 stands for; what is kept of it stays bf16."""
    shutil.copytree(source, tmp_path / "fp8")
    expected = make_fp8(tmp_path / "fp8")
    quantize(tmp_path / "fp8", tmp_path / "out")
    rounded = stored_weights(tmp_path / "out")
    for name, weight in expected.items():
        assert float((rounded[name] - weight).norm() / weight.norm()) < 0.12, name
    assert rounded["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_refusals(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(source, tmp_path / "out", scheme="int8")
    with pytest.raises(UsageError, match="quantised already"):
        quantize(tmp_path / "out", tmp_path / "again")
    with pytest.raises(UsageError, match="not empty"):
        quantize(source, tmp_path / "out")
    with pytest.raises(UsageError, match="whole groups of 128"):
        quantize(source, tmp_path / "wide", scheme="int4-g128", head="keep")
    shutil.copytree(source, tmp_path / "broken")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    poke(tmp_path / "broken", name, torch.tensor(torch.nan))
    for sample in (None, SAMPLE):
        with pytest.raises(CorruptCheckpoint, match=name):
            quantize(tmp_path / "broken", tmp_path / "never", sample=sample)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DoesNotFit, match="GiB"):
        quantize(source, tmp_path / "never")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "broken"}


@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[6], FORMS[7]], ids=str)
def test_codes_are_not_rounded_again(tmp_path: Path, form: PackedForm) -> None:
    packed_folder(tmp_path / "packed", form)
    with pytest.raises(UsageError, match=rf"quantised already \({form.method}: {form.layout} int"):
        quantize(tmp_path / "packed", tmp_path / "never")
    assert not (tmp_path / "never").exists()
