"""qnext demo: a few minutes from nothing to a small model that completes Python."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qnext.cli._training import TrainingDisplay
    from qnext.engine import SamplingParams
    from qnext.recipes.recipe import Run

_PROMPTS = (
    "def read_lines(path, encoding=None):\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import os\nimport sys\n\ndef main(argv=None):\n",
)
_SAMPLE_PROMPT = "def"


def command(
    minutes: Annotated[float, typer.Option(min=0.01, max=600.0, help="time to train for")] = 200 / 60,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="complete what you type, at the end")] = True,
    out: Annotated[Path, typer.Option(help="folder of the run; an earlier demo there is replaced")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="seed of weights, data order and samples")] = 0,
) -> None:
    """Train a small Qwen3-Next on the Python library of this machine, report how well it does, and try it.

    Nothing is downloaded. Leaves the model in OUT/model, as a Hugging Face folder.
    """
    from qnext.cli._training import TrainingDisplay, interruptible
    from qnext.ops import keep_freed_memory
    from qnext.recipes import demo
    from qnext.recipes.recipe import prepare

    recipe = demo(seconds=60.0 * minutes, seed=seed)
    keep_freed_memory()
    _remove_earlier(out)
    display = TrainingDisplay(recipe.train)
    display.note("reading the Python library, training a tokenizer on it")
    run = prepare(recipe, out, hooks=display.hooks(on_sample=lambda step: _sample(run, display, seed)))
    display.describe(run)
    with interruptible(run.trainer), display:
        run.trainer.run()
    _report(run, display)
    folder = run.save()
    display.note(f"model saved in {folder}")
    _complete_prompts(run, display, seed)
    if chat:
        _chat(run, display, seed)


def _remove_earlier(out: Path) -> None:
    """Make room for the run. Only what a run made is removed."""
    from qnext.errors import UsageError

    if not out.exists():
        return
    if any(out.iterdir()) and not (out / "tokenizer").is_dir():
        raise UsageError(f"{out}: exists and is not an earlier demo; choose another --out")
    shutil.rmtree(out)


def _sampling(max_tokens: int, seed: int) -> SamplingParams:
    from qnext.engine import SamplingParams

    return SamplingParams(temperature=0.6, top_p=0.9, repetition_penalty=1.1, max_tokens=max_tokens, seed=seed)


def _generate(run: Run, prompt: str, *, max_tokens: int, seed: int) -> str:
    from qnext.engine import Engine

    engine = Engine(run.trainer.model, max_num_seqs=1, max_model_len=1024)
    (completion,) = engine.generate([run.tokenizer.encode(prompt)], _sampling(max_tokens, seed))
    return run.tokenizer.decode(list(completion.output_ids), skip_special=True)


def _sample(run: Run, display: TrainingDisplay, seed: int) -> None:
    text = _SAMPLE_PROMPT + _generate(run, _SAMPLE_PROMPT, max_tokens=48, seed=seed)
    display.note(f"sample at step {run.trainer.step}:")
    display.show_text(text)


def _report(run: Run, display: TrainingDisplay) -> None:
    """Bits per byte, acceptance of drafts and balance of the experts, on stdout."""
    trainer = run.trainer
    result = trainer.evaluate()
    print(f"trained {trainer.step} steps, {trainer.tokens:,} tokens in {trainer.elapsed:.0f} s")
    if result is not None:
        print(f"held-out files: {result.bits_per_byte:.3f} bits per byte ({result.num_bytes:,} bytes)")
        if result.mtp_acceptance is not None:
            print(f"multi-token prediction: {result.mtp_acceptance:.1%} of drafted tokens are the trunk's choice")
    experts = display.last_experts
    if experts is not None:
        worst = max(experts.max_over_mean)
        print(
            f"experts: busiest at {worst:.2f} times the mean load, {sum(experts.num_dead)} of "
            f"{len(experts.num_dead) * trainer.model.config.num_experts} without a token, load entropy "
            f"{min(experts.entropy):.1%} of even in the least balanced layer"
        )


def _complete_prompts(run: Run, display: TrainingDisplay, seed: int) -> None:
    for prompt in _PROMPTS:
        display.note("prompt and completion:")
        print(prompt + _generate(run, prompt, max_tokens=96, seed=seed) + "\n")


def _chat(run: Run, display: TrainingDisplay, seed: int) -> None:
    from qnext.cli.chat import run_chat

    if sys.stdin.isatty():
        display.note("your turn: type the beginning of some Python, the model goes on")
    run_chat(run.trainer.model, run.tokenizer, params=_sampling(128, seed), max_model_len=1024)
