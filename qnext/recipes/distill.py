"""Distillation from a teacher that is asked beforehand: what it makes of the plan that all fine-tuning shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext.config import ModelConfig
from qnext.engine.storage.fingerprint import weights_digest
from qnext.errors import UsageError
from qnext.files import remove_file, write_file
from qnext.model import CausalLM
from qnext.recipes.methods import Base
from qnext.recipes.sft import Sft, SftConfig
from qnext.session.folder import ProgressOf, Report, TextFolder, load_weights, open_folder
from qnext.text.lessons import Teacher
from qnext.text.tokenizer import Tokenizer
from qnext.training import TrainConfig, TrainSource
from qnext.training.build import Tokenizing
from qnext.training.distill import TAUGHT, Distillation, HeldOutTeaching, KeptTokens, held_out_teaching
from qnext.training.ranks import first_then_all
from qnext.training.samples import SampleSet, SampleStream
from qnext.training.shards import DataShard
from qnext.training.teacher import ANSWERS, Asking, ask, check_one_vocabulary

_TEACHER = "teacher.json"


@dataclass(frozen=True)
class DistillConfig(SftConfig):
    """The choices of distillation: see Distillation and Asking. Raises UsageError naming what is impossible."""

    teacher: str = ""  # a model
    share: float = 1.0  # of the teacher in the loss; the rest is that of SFT
    temperature: float = 1.0
    kept: KeptTokens = "sampled"
    budget: int = 128  # bytes on disk for each learnt token
    router_coefficient: float = 0.0  # of the divergence of the routers

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise UsageError("--teacher MODEL is missing")
        if self.kept not in ("top", "sampled"):
            raise UsageError(f"kept must be one of top, sampled, not {self.kept!r}")
        _ = self.objective

    @property
    def objective(self) -> Distillation:
        return Distillation(self.share, self.temperature, router=self.router_coefficient)


class Distill:
    """Distillation as a Method: samples, labels and masks are those of SFT."""

    sample = Sft.sample
    config = DistillConfig
    asks_model = False

    def tokenizing(self, config: DistillConfig, teacher: Teacher, **facts: Any) -> Tokenizing:
        """Raises UsageError where the teacher has another vocabulary."""
        check_teacher(config.teacher, teacher.tokenizer)
        return Sft().tokenizing(config, teacher, **facts)

    def train_values(self, *, lr: float, sequence_length: int) -> dict[str, Any]:
        return {}

    def sets(self, config: DistillConfig, sources: Sequence[Sequence[DataShard]], base: Base) -> list[SampleSet]:
        """Documents with the teacher's answers, which stand in files beside the shards. The teacher is loaded only
        where one is missing, in the first process."""
        return first_then_all(base.ranks, lambda is_first: self._answered(config, sources, base))

    def _answered(self, config: DistillConfig, sources: Sequence[Sequence[DataShard]], base: Base) -> list[SampleSet]:
        folder = sources[0][0].path.parent
        teacher = AskedTeacher(config.teacher, folder, base.progress)
        asking = Asking.within(
            config.budget,
            config.kept,
            teacher.folder.tokenizer.vocab_size,
            temperature=config.temperature,
            seed=base.train.seed,
            **_routers(config, base.model.config, teacher.folder),
        )
        digest, size = teacher.digest, base.train.tokens_per_batch
        with base.progress("asking the teacher") as report:
            told = TokensTold(report, sum(int(shard.ends[-1]) for shards in sources for shard in shards))
            parts = [
                [
                    part
                    for shard in shards
                    for part in ask(
                        teacher.load,
                        shard,
                        folder,
                        asking,
                        of=digest,
                        tokens_per_batch=size,
                        report=told.of(shard),
                    )
                ]
                for shards in sources
            ]
        kept = {part.path for each in parts for part in each}
        for path in set(folder.glob(f"*{ANSWERS}")) - kept:
            remove_file(path)
        return [SampleSet(each, kind=TAUGHT) for each in parts]

    def source(self, config: DistillConfig, stream: SampleStream, base: Base) -> TrainSource:
        return stream

    def objective(self, config: DistillConfig, train: TrainConfig) -> Distillation:
        return config.objective.with_coefficients(train)

    def evaluate(
        self, config: DistillConfig, model: CausalLM, held_out: SampleSet, train: TrainConfig
    ) -> HeldOutTeaching:
        return held_out_teaching(model, config.objective, held_out, tokens_per_batch=train.tokens_per_batch)


def check_teacher(name: str, student: Tokenizer) -> None:
    """Raises UsageError where the teacher has another vocabulary than the student."""
    other = open_folder(name)
    check_one_vocabulary(student, other.tokenizer, names=("the student", str(other.path)))


class AskedTeacher:
    """A teacher by its name, whose weights are read when they are needed. `digest` tells it from others; it stands in
    `beside`, so that it is known again without reading them, as long as no file of the teacher changes."""

    def __init__(self, name: str, beside: Path, progress: ProgressOf) -> None:
        self.folder = open_folder(name)
        self._path, self._progress = beside / _TEACHER, progress
        self._model: CausalLM | None = None

    @property
    def digest(self) -> str:
        files = self._files()
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
            if known["files"] == files:
                return str(known["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = weights_digest(self.load()).hex()
        write_file(self._path, json.dumps({"files": files, "digest": digest}) + "\n")
        return digest

    def load(self) -> CausalLM:
        if self._model is None:
            self._model = load_weights(self.folder, progress=self._progress).eval().requires_grad_(False)
        return self._model

    def _files(self) -> list[list[Any]]:
        root = self.folder.path
        found = [(path, path.stat()) for path in sorted(root.rglob("*")) if path.is_file()]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in found]


class TokensTold:
    """Reports tokens of all shards from documents of each."""

    def __init__(self, report: Report | None, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def of(self, shard: DataShard) -> Callable[[int], None]:
        before = self._done
        self._done += int(shard.ends[-1])

        def tell(num_documents: int) -> None:
            if self._report is not None:
                self._report(before + int(shard.ends[num_documents - 1]), self._total)

        return tell


def _routers(config: DistillConfig, student: ModelConfig, teacher: TextFolder) -> dict[str, int]:
    """What Asking needs to know of them. Raises UsageError where routers that should agree cannot be compared."""
    if not config.router_coefficient:
        return {}
    ours, theirs = (
        [sum(map(each.is_moe_layer, range(each.num_hidden_layers))), each.num_experts]
        for each in (student, teacher.config)
    )
    if ours != theirs or not all(ours):
        raise UsageError(
            f"router_coefficient: the student has {ours[0]} routers of {ours[1]} experts, {teacher.path} "
            f"{theirs[0]} of {theirs[1]}; only equal ones can be compared"
        )
    return {"num_routers": ours[0], "num_experts": teacher.config.num_experts_per_tok}
