"""What a recipe is, how the command line overrides its values, and how it becomes a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qnext.checkpoint import save_model
from qnext.checkpoint.snapshot import list_snapshots
from qnext.config import ModelConfig
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.errors import UsageError
from qnext.eval import EvalDocument, Perplexity, evaluate_perplexity
from qnext.files import remove_folder, remove_partials
from qnext.model import CausalLM
from qnext.planning import count_active, count_parameters
from qnext.recipes.making import data_of_corpus, making_of
from qnext.recipes.settings import parse_settings, parse_value, with_end_of_run
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import END_OF_TEXT, save_tokenizer, train_bpe
from qnext.training import Hooks, PackedStream, TrainConfig, Trainer
from qnext.training.ranks import ALONE, TrainingRanks, whole_model
from qnext.training.sources import Corpus, take_bytes, tokenize
from qnext.version import __version__


@dataclass(frozen=True)
class Recipe:
    """A complete run. The tokenizer is trained on the training texts, with as many tokens as the model has rows."""

    name: str
    model: ModelConfig
    train: TrainConfig
    corpus: Callable[[], Corpus]
    eval_bytes: int  # how much held-out text the loop evaluates on
    sampling: Mapping[str, Any] = field(default_factory=dict)  # what generation_config.json recommends
    about: str = ""  # what the model is and is not, for the folder's README.md


@dataclass(frozen=True)
class Run:
    """A prepared recipe: `trainer` runs it, `save` writes the model folder."""

    recipe: Recipe
    folder: Path
    corpus: Corpus
    tokenizer: Tokenizer
    trainer: Trainer
    evaluate: Callable[[], Perplexity] | None

    def save(self) -> Path:
        """Write weights, configuration, tokenizer, recommended sampling and a README.md to `<folder>/model`, replacing
        an earlier one."""
        target, trainer = self.folder / "model", self.trainer
        model = whole_model(trainer.model, trainer.part_of, trainer.ranks)
        end_id, pad_id = model.config.eos_token_id, model.config.pad_token_id
        generation: dict[str, Any] = {"eos_token_id": end_id, "pad_token_id": pad_id}
        if self.recipe.sampling:
            generation |= {"do_sample": True, **self.recipe.sampling}

        def write() -> None:
            save_model(
                model,
                target,
                tokenizer_folder=self.folder / "tokenizer",
                overwrite=True,
                generation_config=generation,
                readme=self._card(),
                making=making_of(f"train {self.recipe.name}", trainer, {}, data=data_of_corpus(self.corpus)),
            )

        trainer.ranks.by_first(write)
        return target

    def complete(self, prompt: str, *, max_tokens: int, seed: int) -> str:
        """What the model goes on with, as the recipe recommends to sample it."""
        engine = Engine.of(self.trainer.model, EngineConfig(max_num_seqs=1, max_model_len=1024))
        params = SamplingParams(**self.recipe.sampling, max_tokens=max_tokens, seed=seed)
        (request,) = engine.generate([self.tokenizer.encode(prompt)], params)
        return self.tokenizer.decode(list(request.output_ids), skip_special=True)

    def _card(self) -> str:
        """A model card. `model_name` is what a server calls the model."""
        counts, active = count_parameters(self.trainer.model.config), count_active(self.trainer.model.config)
        return (
            f"---\nmodel_name: {self.recipe.name}\n---\n\n# {self.recipe.name}\n\n"
            + (f"{self.recipe.about}\n\n" if self.recipe.about else "")
            + f"{counts.total:,} parameters, {active.with_head:,} active for a token; "
            f"trained on {self.trainer.tokens:,} tokens in {self.trainer.step:,} steps with qnext {__version__}.\n\n"
            f"Data: {self.corpus.description}.\n"
        )


def prepare(
    recipe: Recipe, folder: Path, *, resume: bool = False, hooks: Hooks | None = None, ranks: TrainingRanks = ALONE
) -> Run:
    """Read the texts, and make tokenizer, model and trainer. With `resume`, continue from the newest snapshot in
    `folder`.

    An `evaluate` in `hooks` is replaced by bits per byte on held-out text. Raises UsageError when `folder` holds a run
    and `resume` is false, or holds none and `resume` is true.
    """
    corpus = recipe.corpus()
    ranks.by_first(lambda: _begin(recipe, corpus, folder, resume=resume))
    tokenizer = Tokenizer.from_folder(folder / "tokenizer", num_rows=recipe.model.vocab_size)
    (end_id,) = tokenizer.eos_ids
    config = recipe.model.with_(eos_token_id=end_id, pad_token_id=end_id)
    model = ranks.new_model(config, seed=recipe.train.seed)
    documents = tokenize([file.text for file in corpus.train], tokenizer, end_id=end_id)
    stream = PackedStream(
        documents,
        tokens_per_batch=recipe.train.tokens_per_batch,
        sequence_length=recipe.train.sequence_length,
        seed=recipe.train.seed,
    )
    evaluate = _evaluation(recipe, corpus, tokenizer, model, end_id)
    hooks = replace(hooks or Hooks(), evaluate=evaluate)
    trainer = Trainer(model, stream, recipe.train, folder=folder, hooks=hooks, ranks=ranks)
    if resume:
        trainer.resume()
    return Run(recipe, folder, corpus, tokenizer, trainer, evaluate)


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run that can continue, which needs a complete tokenizer. Otherwise a run begins
    anew."""
    tokenizer = [folder / "tokenizer" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    return all(file.is_file() for file in tokenizer) or bool(list_snapshots(folder / "snapshots"))


def _begin(recipe: Recipe, corpus: Corpus, folder: Path, *, resume: bool) -> None:
    """Look at the folder, and make the tokenizer of a new run."""
    has_run, tokenizer = is_run(folder), folder / "tokenizer"
    if has_run and not resume:
        raise UsageError(f"{folder} holds a run already; --resume continues it, another --out starts a new one")
    if resume and not has_run:
        raise UsageError(f"{folder} holds no run that could be resumed")
    if has_run:
        return
    if tokenizer.is_dir():
        remove_folder(tokenizer)  # half of one
    save_tokenizer(
        train_bpe((file.text for file in corpus.train), vocab_size=recipe.model.vocab_size),
        tokenizer,
        model_max_length=recipe.model.max_position_embeddings,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def _evaluation(
    recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, model: CausalLM, end_id: int
) -> Callable[[], Perplexity] | None:
    """None where no text is held out."""
    if not corpus.held_out:
        return None
    texts = [file.text for file in take_bytes(corpus.held_out, limit=recipe.eval_bytes)]
    documents = [
        EvalDocument(ids.tolist(), len(text.encode()))
        for ids, text in zip(tokenize(texts, tokenizer, end_id=end_id), texts, strict=True)
    ]
    return lambda: evaluate_perplexity(
        model, documents, sequence_length=recipe.train.sequence_length, tokens_per_batch=recipe.train.tokens_per_batch
    )


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """`recipe` with `key=value` settings: fields of TrainConfig, and `model.<field>` for fields of ModelConfig.

    `total_steps` and `time_budget` replace each other; `model.num_hidden_layers` repeats or cuts the layer pattern.
    Raises UsageError naming the setting when the key is unknown or the value does not parse.
    """
    model = recipe.model
    train: list[str] = []
    for setting in settings:
        key, _, text = setting.partition("=")
        if key == "model.num_hidden_layers":
            model = model.with_layers(parse_value(text, int, key))
        elif key.startswith("model."):
            (changes,) = parse_settings([setting.removeprefix("model.")], ModelConfig)
            model = model.with_(**changes)
        else:
            train.append(setting)
    (changes,) = parse_settings(train, TrainConfig)
    return replace(recipe, model=model, train=recipe.train.with_(**with_end_of_run(changes)))


def make_room(out: Path) -> None:
    """Remove an earlier run from the folder, and nothing else. Raises UsageError for a folder that is no run."""
    remove_partials(out.parent, out.name)
    if not out.exists():
        return
    if out.is_symlink():
        raise UsageError(f"{out}: is a link; name the folder that it leads to")
    remove_partials(out)
    if any(out.iterdir()) and not (out / "tokenizer").is_dir():
        raise UsageError(f"{out}: exists and is not an earlier demo; choose another --out")
    remove_folder(out)
