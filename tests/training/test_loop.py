from __future__ import annotations

import itertools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qnext.model import CausalLM, Router
from qnext.ops import backend_of
from qnext.training import Diverged, Hooks, PackedStream, StepMetrics, TrainConfig, Trainer, precision
from qnext.training.metrics import expert_stats
from qnext.training.precision import choose_precision
from tests.training.models import documents, tiny_model

CONFIG = TrainConfig(
    lr=2e-2,
    tokens_per_batch=48,
    sequence_length=20,
    total_steps=6,
    accumulation=2,
    precision="float32",
    mtp_coefficient=0.3,
    warmup_fraction=0.0,
    expert_stats_every=1,
)


def make_trainer(
    config: TrainConfig = CONFIG,
    *,
    model: CausalLM | None = None,
    folder: Path | None = None,
    hooks: Hooks | None = None,
    docs: list[np.ndarray] | None = None,
) -> Trainer:
    stream = PackedStream(
        docs or documents([30, 9, 2, 17, 60, 23]),
        tokens_per_batch=config.tokens_per_batch,
        sequence_length=config.sequence_length,
        seed=config.seed,
    )
    return Trainer(model or tiny_model(), stream, config, folder=folder, hooks=hooks)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_step_changes_every_parameter_and_every_expert_with_a_token(optimizer: str) -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    received: dict[str, set[int]] = {}

    def hook(name: str) -> None:
        def keep(module: torch.nn.Module, inputs: object, output: object) -> None:
            received.setdefault(name, set()).update(output.routing.experts_TA.flatten().tolist())  # type: ignore[attr-defined]

        model.get_submodule(name).register_forward_hook(keep)

    for name, module in model.named_modules():
        if isinstance(module, Router):
            hook(name)
    make_trainer(CONFIG.with_(optimizer=optimizer, weight_decay=0.0), model=model).run(until_step=1)
    after = dict(model.named_parameters())
    for name, p in after.items():
        assert not torch.equal(p, before[name]), name
    assert any(name.startswith("mtp.") for name in after)
    for router, experts in received.items():
        for matrix in ("gate_up_proj", "down_proj"):
            name = router.removesuffix("gate") + "experts." + matrix
            changed = {e for e in range(6) if not torch.equal(after[name][e], before[name][e])}
            assert changed == experts, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls_on_repeated_text(optimizer: str) -> None:
    losses: list[StepMetrics] = []
    config = CONFIG.with_(total_steps=60, optimizer=optimizer, accumulation=1, expert_stats_every=0)
    make_trainer(config, docs=documents([30, 21]), hooks=Hooks(on_step=losses.append)).run()
    assert losses[0].loss > 3.5
    assert losses[-1].loss < 0.5  # the first tokens of a piece cannot be known
    assert losses[-1].mtp_loss is not None and losses[-1].mtp_loss < 1.0


def test_mtp_starts_late() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("mtp.")}
    trainer = make_trainer(CONFIG.with_(mtp_start=0.5), model=model)
    trainer.run(until_step=3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    trainer.run(until_step=4)
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_a_step_with_an_infinite_gradient_is_skipped_and_counted() -> None:
    model = tiny_model()
    seen: list[StepMetrics] = []
    trainer = make_trainer(model=model, hooks=Hooks(on_step=seen.append))
    trainer.run(until_step=1)
    before = [p.detach().clone() for p in model.parameters()]
    handle = model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    trainer.run(until_step=2)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    handle.remove()
    trainer.run(until_step=3)
    assert [m.was_skipped for m in seen] == [False, True, False]
    assert seen[-1].num_skipped == 1
    assert not torch.equal(next(model.parameters()), before[0])


def test_endless_infinite_gradients_end_the_run() -> None:
    model = tiny_model()
    model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(Diverged, match="step 10"):
        make_trainer(CONFIG.with_(total_steps=50), model=model).run()


def test_a_run_that_became_unusable_keeps_what_was_usable(tmp_path: Path) -> None:
    """The weights of step 4 give no finite gradient: its snapshot is named, and that of step 3 is still there."""
    model = tiny_model()
    config = CONFIG.with_(total_steps=50, snapshot_every=1, keep_snapshots=2)
    trainer = make_trainer(config, model=model, folder=tmp_path)
    trainer.run(until_step=4)
    model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(Diverged, match=r"without .*step-00000004 --resume continues from step-00000003"):
        trainer.run()
    shutil.rmtree(tmp_path / "snapshots" / "step-00000004")
    again = make_trainer(config, folder=tmp_path)
    assert again.resume() == tmp_path / "snapshots" / "step-00000003"
    again.run(until_step=5)
    assert again.num_skipped == 0


@dataclass(frozen=True)
class Result:
    score: float


def test_hooks_and_metrics_file(tmp_path: Path) -> None:
    samples: list[int] = []
    evaluations: list[tuple[int, Result]] = []
    model = tiny_model()

    def evaluate() -> Result:
        assert not model.training and not torch.is_grad_enabled()
        return Result(1.5)

    hooks = Hooks(
        evaluate=evaluate,
        on_evaluation=lambda step, result: evaluations.append((step, result)),
        on_sample=samples.append,
    )
    config = CONFIG.with_(eval_every=2, sample_every=3)
    trainer = make_trainer(config, model=model, folder=tmp_path, hooks=hooks)
    trainer.run()
    assert samples == [3, 6]
    assert evaluations == [(2, Result(1.5)), (4, Result(1.5)), (6, Result(1.5))]
    assert trainer.evaluate() is None, "step 6 is evaluated already"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "evaluation" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "evaluation" in line] == [2, 4, 6]
    assert steps[-1]["tokens"] == 6 * 2 * 48
    for line in steps:
        assert {"loss", "mtp_loss", "balance", "z_loss", "lr", "grad_norm", "tokens_per_second"} <= line.keys()
        assert len(line["experts"]["max_over_mean"]) == 3
        assert 0.9 < line["balance"] < 3.0


def test_stop_ends_after_the_step() -> None:
    trainer = make_trainer(hooks=Hooks(on_step=lambda m: setattr(trainer, "should_stop", m.step == 2)))
    trainer.run()
    assert trainer.step == 2 and not trainer.is_done


def test_time_budget_ends_the_run_and_moves_the_schedule() -> None:
    seen: list[StepMetrics] = []
    config = CONFIG.with_(total_steps=None, time_budget=1.5, accumulation=1)
    trainer = make_trainer(config, hooks=Hooks(on_step=seen.append))
    trainer.run()
    assert trainer.is_done and trainer.elapsed >= 1.5
    assert seen[-1].elapsed - seen[-1].tokens_per_second ** -1 * 48 < 1.5
    assert all(a.progress <= b.progress for a, b in itertools.pairwise(seen))
    assert seen[0].progress < 0.5 and seen[-1].lr < config.lr


def test_autocast_runs_and_stays_close() -> None:
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        seen: list[StepMetrics] = []
        config = CONFIG.with_(precision=dtype, total_steps=2)
        model = tiny_model()
        make_trainer(config, model=model, hooks=Hooks(on_step=seen.append)).run()
        losses[dtype] = [m.loss for m in seen]
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses["bfloat16"] != losses["float32"]
    # bf16 has 8 bits; a loss averages the errors of its products.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)


def test_precision_is_measured_or_obeyed() -> None:
    measured = choose_precision("auto", torch.device("cpu"))
    assert measured.float32_seconds is not None and measured.bfloat16_seconds is not None
    share = 1 / 4 if backend_of(torch.device("cpu")).fuses_gradients else 2 / 3
    is_faster = measured.bfloat16_seconds < measured.float32_seconds * share
    assert measured.precision == ("bfloat16" if is_faster else "float32")
    assert choose_precision("bfloat16", torch.device("cpu")) == ("bfloat16", None, None)


@pytest.mark.parametrize(("least", "chosen"), [(0.9, "float32"), (0.2, "bfloat16")])
def test_bf16_has_to_win_every_time(monkeypatch: pytest.MonkeyPatch, least: float, chosen: str) -> None:
    """One round of three that is near fp32 is enough to stay there."""
    rounds = itertools.cycle([(1.0, 0.1), (1.0, least), (2.0, 0.2)])
    monkeypatch.setattr(precision, "_seconds", lambda device: next(rounds))
    assert choose_precision("auto", torch.device("cpu")) == (chosen, 1.0, least)


def test_a_resumed_run_keeps_the_precision_that_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine would choose otherwise by now."""
    config = CONFIG.with_(precision="auto")
    for bfloat16, name in ((0.01, "bfloat16"), (9.0, "float32")):
        monkeypatch.setattr(precision, "_seconds", lambda device, seconds=bfloat16: (1.0, seconds))
        first = make_trainer(config, folder=tmp_path / name)
        assert first.precision.precision == name
        first.run(until_step=1)
        first.save()
        monkeypatch.setattr(precision, "_seconds", lambda device, seconds=9.01 - bfloat16: (1.0, seconds))
        second = make_trainer(config, folder=tmp_path / name)
        assert second.precision.precision != name
        second.resume()
        assert second.precision.precision == name


def test_a_busy_machine_does_not_change_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs run during the first products: by the clock on the wall each of them takes a second longer."""
    calls = itertools.count()

    def wall() -> float:
        return time.perf_counter() + min(next(calls), 10)

    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=wall, thread_time=time.thread_time))
    measured = choose_precision("auto", torch.device("cpu"))
    assert measured.float32_seconds is not None and measured.float32_seconds < 1.0


@pytest.mark.parametrize("parallel", [1, 2])
def test_recomputed_activations_change_no_bit(parallel: int) -> None:
    """Losses, tokens per expert (balance included) and parameters, with heads that the native kernels take."""
    sizes = {"head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "hidden_size": 32}
    runs = []
    for is_recomputed in (False, True):
        seen: list[StepMetrics] = []
        model = tiny_model(**sizes)
        config = CONFIG.with_(checkpoint_activations=is_recomputed, parallel_batches=parallel, balance_coefficient=1.0)
        make_trainer(config, model=model, hooks=Hooks(on_step=seen.append)).run(until_step=3)
        numbers = [(m.loss, m.mtp_loss, m.balance, m.grad_norm, m.experts) for m in seen]
        runs.append((numbers, [p.detach() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_recomputed_activations_are_not_kept() -> None:
    kept = []
    for is_recomputed in (False, True):
        trainer = make_trainer(CONFIG.with_(checkpoint_activations=is_recomputed))
        batch = trainer.stream.next_batch().batch
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.nbytes) or x, lambda x: x):  # type: ignore[func-returns-value]
            trainer.model(batch)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 5


def test_expert_stats() -> None:
    stats = expert_stats(torch.tensor([[4, 4, 4, 4], [0, 16, 0, 0], [6, 2, 0, 0]]))
    assert stats.max_over_mean == [1.0, 4.0, 3.0]
    assert stats.num_dead == [0, 3, 2]
    assert stats.entropy == pytest.approx([1.0, 0.0, 0.811278124459 / 2.0])
