"""Everything that the package puts on a disk, each as what was there before, the work, and what a reader finds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qnext.checkpoint import create_folder, save_model
from qnext.checkpoint.snapshot import Snapshot, newest_snapshot, save_snapshot
from qnext.cli import main
from qnext.config import ModelConfig, preset
from qnext.files import write_file
from qnext.recipes import RECIPES
from qnext.recipes.recipe import is_run, make_room, prepare
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.cli.test_train import tiny_recipe
from tests.durability.faults import Outcome, Step, run_child, without_exchange
from tests.durability.scenario import ABSENT, INIT_ARGUMENTS, Call, Scenario, Verb, as_a_verb, digest, slow
from tests.durability.served import Audit, Batch, DiskCache, Keys, RunBatch
from tests.training.models import tiny_model

RECIPES["tiny"] = tiny_recipe


class ShardByShard(Verb):
    """Quantising that gives up its source: what was there before is not there again, and nothing is lost by that."""

    def __init__(self) -> None:
        super().__init__("q", "quantize", "{}/model", "{}/q", "--scheme", "int8-g32", "--delete-source-shards")

    def prepare(self, root: Path) -> None:
        config = tiny_quantizable()
        save_tokenizer(byte_level_tokenizer(), root / "t", model_max_length=9, chat_template="x")
        create_folder(config, root / "model", seed=1, tokenizer_folder=root / "t", max_shard_bytes=60_000)


class Replaced(Call):
    """A model in the place of another. Where the system cannot exchange, the old one may wait for the next run."""

    def __init__(self, *, exchanges: bool) -> None:
        super().__init__(
            lambda root: save_model(other_model(), root / "m", overwrite=True, readme="new"),
            lambda root: digest(root / "m"),
            lambda root: save_model(tiny_model(), root / "m"),
        )
        self._exchanges = exchanges

    def work(self, root: Path) -> object:
        with nullcontext() if self._exchanges else without_exchange():
            return super().work(root)

    def fault_of(self, seen: Any, before: Any, after: Any, outcome: Outcome) -> str | None:
        if not self._exchanges and seen == ABSENT and outcome.code is None:
            return None
        return super().fault_of(seen, before, after, outcome)


class Train(Scenario):
    """A whole run: the model that comes out is the same, bit for bit, whatever happened on the way."""

    is_slow = True

    def __init__(self, *settings: str) -> None:
        self._settings = [word for setting in settings for word in ("--set", setting)]

    def _run(self, root: Path, *more: str) -> object:
        return main(["train", "tiny", "--out", str(root / "run"), *self._settings, *more])

    def work(self, root: Path) -> object:
        return self._run(root)

    def again(self, root: Path) -> Outcome:
        first = run_child(root, lambda: self._run(root))
        return run_child(root, lambda: self._run(root, "--resume")) if first.code == 2 else first

    def look(self, root: Path) -> Any:
        newest_snapshot(root / "run" / "snapshots")
        return digest(root / "run" / "model")

    def tells(self, outcome: Outcome, root: Path, code: int) -> str | None:
        """The run goes on without a snapshot or a line of metrics, and says so; the rest of stderr is its progress."""
        told = [line for line in outcome.err.splitlines() if line.startswith("qnext ")]
        struck = [step for step in outcome.steps if step not in outcome.done]
        # A folder that is there need not be made, and what cannot be deleted waits for the next run.
        matters = any(step.call not in ("mkdir", "unlink", "rmdir") and not self._removes(step) for step in struck)
        if "Traceback" in outcome.err or (matters and not told) or any(".partial-" in line for line in told):
            return f"told as {outcome.err[-400:]!r}"
        return None if outcome.code in (0, code) else f"exit code {outcome.code}"

    def _removes(self, step: Step) -> bool:
        """Of an old snapshot: its rename, or the flush of the names around it."""
        is_rename = step.call == "rename" and step.before is not None and ".partial-" not in step.before
        return is_rename or (step.call == "fsync" and step.path.endswith("/snapshots"))


class DemoAgain(Scenario):
    """An earlier demo goes and a run begins in its place."""

    def prepare(self, root: Path) -> None:
        prepare(tiny_recipe(), root / "run")
        (root / "run" / "metrics.jsonl").write_text("{}\n")

    def work(self, root: Path) -> object:
        def begin() -> None:
            make_room(root / "run")
            prepare(tiny_recipe(), root / "run")

        return as_a_verb(begin)

    def look(self, root: Path) -> Any:
        return is_run(root / "run") and not (root / "run" / "metrics.jsonl").exists()

    def fault_of(self, seen: Any, before: Any, after: Any, outcome: Outcome) -> str | None:
        return None  # what goes may be gone; that the next run begins is what counts


def tiny_quantizable() -> ModelConfig:
    return replace(
        preset("nano-5m").with_layers(1), vocab_size=300, hidden_size=64, num_experts=2, num_experts_per_tok=1
    )


def other_model() -> Any:
    return tiny_model(seed=5, num_nextn_predict_layers=0)


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"model": {"w": torch.full((4,), float(step))}, "random": {"cpu": torch.ones(3)}}, {})


def newest_step(root: Path) -> Any:
    found = newest_snapshot(root / "snapshots")
    if found is None:
        return ABSENT
    assert found[1].tensors["model"]["w"].tolist() == [float(found[1].step)] * 4
    return found[1].step


def save(step: int, *, keep: int = 1) -> Callable[[Path], object]:
    return lambda root: save_snapshot(root / "snapshots", snapshot(step), keep=keep)


def begin(root: Path) -> object:
    if not is_run(root / "run"):
        return prepare(tiny_recipe(), root / "run")
    return prepare(tiny_recipe(), root / "run", resume=True)


_GGUF = Verb("m.gguf", "convert", "{}/model", "{}/m.gguf", "--type", "q8_0", makes_model=True)
SCENARIOS: dict[str, Scenario] = {
    "snapshot": Call(save(2), newest_step, save(1)),
    "same snapshot again": Call(save(1), newest_step, save(1)),
    "first snapshot": Call(save(1), newest_step),
    "file": Call(lambda root: write_file(root / "f", "new"), lambda root: digest(root / "f")),
    "file replaced": Call(
        lambda root: write_file(root / "f", "new"),
        lambda root: digest(root / "f"),
        lambda root: write_file(root / "f", "old"),
    ),
    "tokenizer": Call(
        lambda root: save_tokenizer(byte_level_tokenizer(), root / "deep" / "t", model_max_length=9, chat_template="x"),
        lambda root: digest(root / "deep" / "t"),
    ),
    "run begun": Call(begin, lambda root: is_run(root / "run")),
    "demo again": DemoAgain(),
    "model replaced": Replaced(exchanges=True),
    "model replaced without exchange": Replaced(exchanges=False),
    "keys create": Keys("create"),
    "keys revoke": Keys("revoke"),
    "keys rotate": Keys("rotate"),
    "audit": Audit(),
    "batch": Batch(),
    "run-batch": RunBatch(),
    "disk cache": slow(DiskCache()),
    "init": slow(Verb("out", *INIT_ARGUMENTS)),
    "quantize": slow(Verb("q", "quantize", "{}/model", "{}/q", "--scheme", "int8-g32", makes_model=True)),
    "quantize shard by shard": slow(ShardByShard()),
    "quantize to records": slow(
        Verb("q", "quantize", "{}/model", "{}/q", "--scheme", "int8-g32", "--records", makes_model=True)
    ),
    "to records": slow(Verb("r", "convert", "{}/model", "{}/r", "--records", makes_model=True)),
    "to gguf": slow(_GGUF),
    "from gguf": slow(Verb("back", "convert", "{}/m.gguf", "{}/back", before=_GGUF)),
    "logits": slow(Verb("l.npy", "logits", "{}/model", "--tokens", "1,2,3", "--out", "{}/l.npy", makes_model=True)),
    "train": Train(
        "total_steps=2",
        "snapshot_every=1",
        "keep_snapshots=1",
        "eval_every=0",
        "model.num_hidden_layers=1",
        "model.num_experts=2",
        "model.num_nextn_predict_layers=0",
    ),
}
