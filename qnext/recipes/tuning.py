"""Fine-tuning: a model folder and files of samples become another folder, or an adapter. A Method says how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.adapters import IN_A_RUN
from qnext.checkpoint.check import layout_of, read_layout
from qnext.checkpoint.load import fill_parameters, is_plain, stored_dtypes
from qnext.checkpoint.provenance import Making, data_of, parent_of
from qnext.checkpoint.resolve import resolve_model
from qnext.errors import FULL, QnextError, warn
from qnext.files import remove_folder
from qnext.lora import describe_adapter
from qnext.model import CausalLM
from qnext.planning import count_parameters
from qnext.planning.plan import check_weights
from qnext.recipes.adapted import AdapterTask, adapt, save_adapted, whole_adapter
from qnext.recipes.chat_folder import tokenizer_folder
from qnext.recipes.drawing import DrawnTogether
from qnext.recipes.making import making_of
from qnext.recipes.methods import Base, Method
from qnext.recipes.settings import parse_settings, with_end_of_run
from qnext.recipes.tuning_task import RunData, TuningTask
from qnext.session.folder import ProgressOf, TextFolder, no_progress, open_folder
from qnext.text.chat import ChatFormat
from qnext.text.lessons import Teacher
from qnext.text.template_files import read_templates
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import END_OF_TEXT
from qnext.training import Hooks, TrainConfig, Trainer
from qnext.training.build import build, built
from qnext.training.ranks import ALONE, TrainingRanks, first_then_all, whole_model
from qnext.training.samples import SampleSet, SampleStream
from qnext.training.shards import DataShard, Manifest
from qnext.version import __version__

_DATA, TOKENIZER = "data", "tokenizer"
_ROUTED_BATCHES = 16  # of the data, whose routing chooses the experts of an adapter
_BYTES_PER_PARAMETER = 16  # weights, gradients and two moments in fp32
_BYTES_OF_BEST = 4  # the weights of the best evaluation, where they are kept


@dataclass(frozen=True)
class TuningData:
    """The tokenised data of a task, and all that is needed to show it."""

    task: TuningTask
    method: Method
    config: Any  # of the method
    train: dict[str, Any]  # settings of TrainConfig
    base: TextFolder
    tokenizer: Tokenizer
    manifest: Manifest
    sources: list[list[DataShard]]

    @property
    def description(self) -> str:
        lines = []
        for source in self.manifest.sources:
            left_out = "".join(
                f"; {count:,} left out, {reason}: {', '.join(source.first_left_out[reason])}"
                + (", ..." if count > len(source.first_left_out[reason]) else "")
                for reason, count in source.num_left_out.items()
            )
            repeated = f"; {source.num_duplicates:,} repeated ones left out" if source.num_duplicates else ""
            lines.append(
                f"{source.path}: {source.num_samples:,} {self.method.sample}, {source.num_tokens:,} tokens, of which "
                f"{source.num_learned:,} are learnt{repeated}{left_out}"
            )
        return "\n      ".join(lines)


@dataclass(frozen=True)
class TuningRun:
    """A prepared run: `trainer` runs it, `save` writes the model folder."""

    data: RunData
    folder: Path
    trainer: Trainer
    dtypes: Mapping[str, torch.dtype]  # in which the base stores its parameters
    adapted: str = ""  # what an adapter changes, for people

    def save(self) -> Path:
        """Write `<folder>/model`: weights in the base's dtypes, tokenizer, chat template, recommended sampling.

        Of an adapter write `<folder>/adapter`. Raises NoEffect where a part of it was not trained.
        """
        ranks, tokens = self.trainer.ranks, self.folder / TOKENIZER
        if self.data.task.adapter is not None:
            adapter, config = whole_adapter(self.trainer.model, ranks), self.trainer.model.config
            options = {"base": self.data.base.path, "tokenizer_folder": tokens}
            ranks.by_first(lambda: save_adapted(adapter, config, self.folder, making=self._making(), **options))
            return self.folder / IN_A_RUN
        target = self.folder / "model"
        model = whole_model(self.trainer.model, self.trainer.part_of, ranks)

        def write() -> None:
            save_model(
                model,
                target,
                dtype=self.dtypes,
                overwrite=True,
                tokenizer_folder=tokens,
                readme=self._card(),
                making=self._making(),
            )

        ranks.by_first(write)
        return target

    def _making(self) -> Making:
        task = self.data.task
        settings = [each for each in task.settings if not each.startswith("teacher=")]  # a place on this machine
        given = {"template": task.template, "recipe": task.recipe, "settings": settings}
        adapter = {} if task.adapter is None else {"adapter": task.adapter.to_json()}
        making = making_of(f"train {task.method}", self.trainer, {**given, **adapter}, data=data_of(task.data))
        teacher = getattr(self.data.config, "teacher", "")
        parents = {"base": self.data.base.path, **({"teacher": resolve_model(teacher)} if teacher else {})}
        making.parents += [parent_of(read_layout(path), role) for role, path in parents.items()]
        return making

    def changes(self) -> list[str]:
        """What an adapter has changed by now, for people."""
        if self.data.task.adapter is None:
            return []
        return describe_adapter(whole_adapter(self.trainer.model, self.trainer.ranks)).lines()

    def _card(self) -> str:
        return (
            f"---\nmodel_name: {self.folder.name}\n---\n\n# {self.folder.name}\n\n"
            f"Fine-tuned from {self.data.base.path.name} on {self.trainer.tokens:,} tokens in {self.trainer.step:,} "
            f"steps with qnext {__version__}.\n\nData: {self.data.description}.\n"
        )


def read_task(
    task: TuningTask, folder: Path, *, method: Method, resume: bool = False, progress: ProgressOf = no_progress
) -> TuningData:
    """Tokenise the data of a task into its folder. With `resume`, what an earlier start made there is taken as it is.

    Raises UsageError, naming file and line, for data that is not understood.
    """
    with made_if_understood(folder):
        return _read_task(task, folder, method=method, resume=resume, progress=progress)


def _read_in_turn(task: TuningTask, folder: Path, is_first: bool, *, resume: bool, **options: Any) -> TuningData:
    """As read_task, with the task in the folder; not first, what another process has read."""
    if not is_first:
        return _read_task(task, folder, resume=True, makes=False, **options)
    data = read_task(task, folder, resume=resume, **options)
    task.write(folder)
    return data


@contextmanager
def made_if_understood(folder: Path) -> Iterator[None]:
    """A folder that the block made does not stay where it raises: nothing in it is worth a second start."""
    was_there = folder.exists()
    try:
        yield
    except (QnextError, OSError) as error:
        if not was_there and folder.exists() and getattr(error, "errno", None) not in FULL:
            remove_folder(folder)
        raise


def _read_task(
    task: TuningTask, folder: Path, *, method: Method, resume: bool, progress: ProgressOf, makes: bool = True
) -> TuningData:
    """Without `makes`, as another process has made it."""
    own, train = parse_settings(task.settings, method.config, TrainConfig)
    config = method.config(**own)
    base = open_folder(task.base)
    tokens = folder / TOKENIZER
    if makes:
        tokenizer_folder(tokens, base, template=task.template, sampling=task.sampling)
    tokenizer = Tokenizer.from_folder(tokens, num_rows=base.config.vocab_size)
    chat_format = ChatFormat.for_folder(tokens, tokenizer=tokenizer)
    try:
        tokenizing = method.tokenizing(
            config,
            Teacher(chat_format, tokenizer, tokenizer.eos_ids),
            end_of_text=_end_of_text(tokenizer),
            sequence_length=train.get("sequence_length", min(4096, base.config.max_position_embeddings)),
            made_with=_made_with(tokens, tokenizer),
        )
        with progress("tokenising") as report:
            paths = [Path(path) for path in task.data]
            manifest = built(paths, folder / _DATA, tokenizing) if resume or not makes else None
            if manifest is None:
                manifest = build(paths, folder / _DATA, tokenizing, report=report)
    finally:
        chat_format.close()
    return TuningData(task, method, config, train, base, tokenizer, manifest, manifest.open(folder / _DATA))


def _end_of_text(tokenizer: Tokenizer) -> int:
    return tokenizer.added_ids.get(END_OF_TEXT, min(tokenizer.eos_ids))


def _made_with(tokens: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    templates = read_templates(tokens)
    assert templates is not None
    return {
        "tokenizer": _hash(tokenizer.backend.to_str()),
        "template": _hash(json.dumps(templates.texts, sort_keys=True)),
        "end_tokens": sorted(tokenizer.eos_ids),
    }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def prepare_tuning(
    task: TuningTask,
    folder: Path,
    *,
    method: Method,
    resume: bool = False,
    hooks: Hooks | None = None,
    progress: ProgressOf = no_progress,
    examination: Callable[[TuningData, Path], Callable[[CausalLM], Any]] | None = None,
    ranks: TrainingRanks = ALONE,
) -> TuningRun:
    """Tokenise the data, load the base in fp32, and make the trainer. With `resume`, continue from the newest snapshot.

    An `evaluate` in `hooks` is replaced by the examination that `examination` makes of the data and the folder of the
    tokenizer, or by the loss on held-out samples. Of several `ranks` the first one makes what stands in files. Each
    reads its part of the base alone, or all of it where the model is asked or adapted, or packed.
    """
    options: dict[str, Any] = {"method": method, "progress": progress}
    data = first_then_all(ranks, partial(_read_in_turn, task, folder, resume=resume, **options))
    in_parts = task.adapter is None and examination is None and not method.asks_model
    model, dtypes, is_cut = load_base(data, progress, ranks if in_parts else ALONE)
    evaluate: Callable[[], Any] | None
    config = _train_config(data, model)
    base = Base(model, config, progress, ranks)
    sets = [each.split(data.config.held_out) for each in method.sets(data.config, data.sources, base)]
    train_sets, held_out = [train for train, _ in sets], [other for _, other in sets if len(other)]

    def stream() -> SampleStream:
        return SampleStream(
            train_sets,
            tokens_per_batch=config.tokens_per_batch,
            seed=config.seed,
            fingerprint=_fingerprint(data),
            weights=data.config.weights,
        )

    adapted = "" if task.adapter is None else _adapt(model, task.adapter, stream(), config)
    source = method.source(data.config, stream(), base)
    drawn = None if examination is None else DrawnTogether(model, ranks)
    if not is_cut:
        ranks.shard(model)
    config = _with_end(config, data, stream)
    if examination is not None and drawn is not None:
        evaluate = _of_whole(drawn, examination(data, folder / TOKENIZER))
    else:
        evaluate = _evaluation(data, model, held_out, config)
    trainer = Trainer(
        model,
        source,
        config,
        objective=method.objective(data.config, config),
        folder=folder,
        hooks=replace(hooks or Hooks(), evaluate=evaluate),
        ranks=ranks,
    )
    if resume:
        trainer.resume()
    return TuningRun(data, folder, trainer, dtypes, adapted)


def _with_end(config: TrainConfig, data: TuningData, stream: Callable[[], SampleStream]) -> TrainConfig:
    """With as many steps as the epochs take, where nothing else ends the run."""
    if "total_steps" in data.train or config.time_budget is not None:
        return config
    num_batches = stream().count_batches(data.config.epochs)
    return config.with_(total_steps=-(-num_batches // config.accumulation))


def _of_whole(drawn: DrawnTogether, examine: Callable[[CausalLM], Any]) -> Callable[[], Any]:
    return lambda: examine(drawn.whole())


def _adapt(model: CausalLM, task: AdapterTask, sample: SampleStream, config: TrainConfig) -> str:
    batches = (sample.next_batch().to(model.device).batch for _ in range(_ROUTED_BATCHES))
    asked = replace(task, mtp=task.mtp and config.mtp_coefficient > 0.0)
    return adapt(model, asked, batches, seed=config.seed)


class LoadedBase(NamedTuple):
    """The base in fp32, or with the weights that it has where an adapter is trained; the types on disk; and whether it
    is cut."""

    model: CausalLM
    dtypes: Mapping[str, torch.dtype]
    is_cut: bool


def load_base(data: RunData, progress: ProgressOf, ranks: TrainingRanks = ALONE) -> LoadedBase:
    """Each of several `ranks` reads its part alone, where weights are stored as their numbers."""
    layout, is_adapted = layout_of(data.base.take_layout()), data.task.adapter is not None
    reads_parts = is_plain(layout) and not is_adapted
    if is_adapted:
        check_weights(str(data.base.path), data.base.stored_bytes)
    else:
        bytes_each = _BYTES_PER_PARAMETER + (_BYTES_OF_BEST if data.train.get("early_stop") else 0)
        needed = bytes_each * count_parameters(data.base.config).total
        if reads_parts:
            needed = needed * ranks.num_here // (ranks.num_shares * ranks.num_cuts)
        check_weights(f"{data.base.path}, with gradients and optimiser", needed)
    with progress("loading") as report:
        if reads_parts:
            dtypes = stored_dtypes(layout)
            model = ranks.filled_model(layout.config, partial(fill_parameters, layout=layout, progress=report))
        else:
            model = load_model(layout, dequantize=not is_adapted, progress=report)
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            model = model if is_adapted else model.float()
    ends = tuple(sorted(data.tokenizer.eos_ids))
    model.config = model.config.with_(eos_token_id=ends if len(ends) > 1 else ends[0])
    return LoadedBase(model, dtypes, is_cut=reads_parts and ranks is not ALONE)


def _train_config(data: TuningData, model: CausalLM) -> TrainConfig:
    """Defaults for the size of the model, under the settings of the task."""
    length = data.manifest.made_with["sequence_length"]
    count = count_parameters(model.config).total
    values: dict[str, Any] = {
        "lr": 2e-5 * (1e9 / count) ** 0.5,  # a starting point; 2e-5 is usual for a model of 1 B
        "tokens_per_batch": max(length, 4096),
        "sequence_length": length,
        "total_steps": 1,  # replaced by what the epochs take
        "warmup_fraction": 0.05,
        "decay_fraction": 0.95,
        "decay_shape": "linear",
        "weight_decay": 0.0,
        "balance_coefficient": 1e-3,
        "z_loss_coefficient": 0.0,
        "mtp_coefficient": 0.1,
        "eval_every": 100,
        "snapshot_every": 100,
    }
    values |= data.method.train_values(lr=values["lr"], sequence_length=length)
    if data.task.adapter is not None:
        values["lr"] *= 10.0  # its factors are small and begin at zero
        values["balance_coefficient"] *= data.task.adapter.router  # routers that stay are not balanced
    return TrainConfig(**{**values, **with_end_of_run(data.train)})


def _fingerprint(data: TuningData) -> str:
    checksums = [[shard.checksum for shard in shards] for shards in data.sources]
    return _hash(json.dumps([checksums, data.config.held_out]))


def _evaluation(
    data: TuningData, model: CausalLM, held_out: Sequence[SampleSet], config: TrainConfig
) -> Callable[[], Any] | None:
    if not held_out:
        warn("no sample is held out; there will be no evaluation")
        return None
    samples = SampleSet(held_out, kind=held_out[0].kind)
    return lambda: data.method.evaluate(data.config, model, samples, config)
