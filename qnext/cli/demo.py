"""`qnext demo`: a few minutes from nothing to a small model that completes Python."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.watching import WatchFlags

if TYPE_CHECKING:
    from qnext.cli.terminal.training import TrainingDisplay
    from qnext.engine import Engine
    from qnext.recipes.recipe import Run
    from qnext.server.inference.served import ServedModel

_PROMPTS = (
    "def read_lines(path, encoding=None):\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import os\nimport sys\n\ndef main(argv=None):\n",
)
_SAMPLE_PROMPT = "def"


def command(
    minutes: Annotated[float, typer.Option(min=0.01, max=600.0, show_default="200 s", help="time to train for")] = 200
    / 60,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="at the end, serve the model's page and complete what you type")
    ] = True,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the page; any other where it is taken")] = 8000,
    out: Annotated[Path, typer.Option(help="folder of the run; an earlier demo there is replaced")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="seed of weights, data order and samples")] = 0,
    *,
    watch: WatchFlags,
) -> None:
    """Train a small Qwen3-Next on the Python library of this machine, report how well it does, and try it.

    The model completes Python code; it is no assistant. Nothing is downloaded. Leaves the model in OUT/model, as a
    Hugging Face folder, and ends with its page open: a URL is printed, and the page is there until the input ends.
    """
    from qnext.cli.terminal.ranks import refuse_ranks
    from qnext.cli.terminal.text import note
    from qnext.cli.terminal.training import TrainingDisplay, watched
    from qnext.ops import keep_freed_memory
    from qnext.recipes import demo
    from qnext.recipes.recipe import make_room, prepare
    from qnext.training.loggers import check_names
    from qnext.training.stopping import interruptible

    refuse_ranks("qnext demo")
    check_names(watch.log or ())
    recipe = demo(seconds=60.0 * minutes, seed=seed)
    keep_freed_memory()
    make_room(out)
    display = TrainingDisplay()
    display.note("reading the Python library, training a tokenizer on it")
    run = prepare(recipe, out, hooks=display.hooks(on_sample=lambda step: _sample(run, display, seed)))
    display.describe(run.trainer, run.corpus.description, vocab_size=run.tokenizer.vocab_size)
    with watched(run.trainer, watch), interruptible(run.trainer, note) as stop, display:
        run.trainer.run()
    if stop.number is not None:
        display.note(f"the model as far as it was trained is saved in {run.save()}")
        stop.raise_for()
    _report(run, display)
    folder = run.save()
    display.note(f"model saved in {folder}; `qnext generate {folder} 'def main('` lets it complete code")
    _complete_prompts(run, display, seed)
    if chat:
        talk_with(folder, display, seed, port)


def _sample(run: Run, display: TrainingDisplay, seed: int) -> str:
    text = _SAMPLE_PROMPT + run.complete(_SAMPLE_PROMPT, max_tokens=48, seed=seed)
    display.note(f"sample at step {run.trainer.step}:")
    display.show_text(text)
    return text


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
        print(prompt + run.complete(prompt, max_tokens=96, seed=seed) + "\n")


def talk_with(folder: Path, display: TrainingDisplay, seed: int, port: int) -> None:
    """The model's page, and the same model in the terminal, until the input ends."""
    from qnext.cli.terminal.chat_loop import converse
    from qnext.cli.terminal.progress import byte_progress
    from qnext.cli.terminal.text import note
    from qnext.client.conversation import RemoteConversation
    from qnext.server.run import Listen, port_or_any, serving
    from qnext.server.server import Server
    from qnext.session.folder import open_folder
    from qnext.session.served import ServeConfig, load_served, name_of

    def load() -> tuple[Engine, ServedModel]:
        config = ServeConfig([name_of(str(folder))], {"max_num_seqs": 4})
        return load_served(open_folder(str(folder)), config, note=note, progress=byte_progress)

    with serving(Server, load, Listen(port=port_or_any(port))) as (server, urls):
        display.note("the model completes Python code; it is no assistant and answers no questions")
        display.note(f"its page, with its experts at work: {urls.public}/")
        if "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ or sys.platform == "darwin":
            webbrowser.open(f"{urls.public}/")
        if sys.stdin.isatty():
            display.note("or here: type the beginning of some Python, the model goes on; Ctrl-D ends page and demo")
        params = {"max_tokens": 128, "seed": seed}
        converse(RemoteConversation(urls.public, None, server.served.name, params, completes=True))
