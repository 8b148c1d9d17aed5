"""`qnext run-batch`: a file of requests in OpenAI's batch form, answered here or by a running server."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli import _sampling as options
from qnext.cli._remote import ApiKey, Url
from qnext.cli._types import Strict, human_int
from qnext.errors import ModelNotFound, UsageError

if TYPE_CHECKING:
    from qnext.cli._batch import Ask, Tally
    from qnext.engine import Engine
    from qnext.server.served import ServedModel


def command(
    input: Annotated[str, typer.Option("-i", "--input", metavar="FILE", help="Requests, a line each; - is stdin.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="Answers, a line each; - is stdout.")],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder; or give --url.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", min=1, metavar="N", help="Requests at once; default: twice --max-num-seqs."),
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option("--request-timeout", metavar="X", help="Seconds of a request; default: no end.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option("--served-model-name", metavar="NAME", help="What requests call MODEL, too; repeatable."),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", min=1, metavar="N", help="Answers of MODEL that are written at once.")
    ] = 16,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", parser=human_int, metavar="N", help="Tokens of a request in all, such as 32k."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads.")] = None,
    chat_template_kwargs: options.TemplateDefaults = None,
    yarn: options.Yarn = None,
    speculation: options.Speculation = None,
    dtype: options.DType = None,
    strict: Strict = False,
) -> None:
    """Answer every request of a file: lines {custom_id, method, url, body} become {id, custom_id, response, error}.

    Urls are /v1/chat/completions, /v1/completions, /v1/responses and /v1/messages. Answers are written as they come.
    Run again with the same output file it goes on where it stopped: what was answered is not asked again, what failed
    is. Exits with 1 when some requests failed.
    """
    if (model is None) == (url is None):
        raise UsageError("give either MODEL or --url")
    if model is None and chat_template_kwargs is not None:
        raise UsageError("--chat-template-kwargs belongs to MODEL; requests to --url have it in their bodies")
    _check_files(input, output)
    if request_timeout is not None and not request_timeout > 0:
        raise UsageError(f"--request-timeout must be positive, not {request_timeout:g}")
    from qnext.cli._batch import Tally, ask_here, ask_there, run_batch
    from qnext.cli._batch_files import BatchOutput, input_lines, read_requests
    from qnext.cli._remote import models_of, root_of

    seconds = request_timeout or math.inf
    number = concurrency or 2 * max_num_seqs
    tally = Tally()
    begin: Callable[[], AbstractAsyncContextManager[Ask]]
    if url is not None:
        root = root_of(url)
        models_of(root, api_key)
        begin = partial(ask_there, root, api_key, concurrency=number, request_seconds=seconds)
    else:
        assert model is not None
        load = _loader(
            model, served_model_name or [], max_num_seqs=max_num_seqs, max_model_len=max_model_len, threads=threads,
            yarn=yarn, speculation=speculation, dtype=dtype, template_defaults=chat_template_kwargs,
        )  # fmt: skip
        begin = lambda: ask_here(*load(), request_seconds=seconds)  # noqa: E731
    lines = list(input_lines(input)) if input == "-" else input_lines(input)
    with _no_empty_file(output), BatchOutput(output) as results:
        asking = begin()
        with _progress(input) as on_progress:
            run_batch(read_requests(lines), results, asking, concurrency=number, tally=tally, on_progress=on_progress)
    print(tally.describe(), file=sys.stderr, flush=True)
    if tally.stopped_by is not None:
        print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        raise typer.Exit(128 + tally.stopped_by)
    raise typer.Exit(1 if tally.failed else 0)


@contextmanager
def _no_empty_file(output: str) -> Iterator[None]:
    """A run that cannot begin leaves no file behind that it made."""
    path = Path(output)
    is_new = output != "-" and not path.exists()
    try:
        yield
    except BaseException:
        if is_new and path.is_file() and not path.stat().st_size:
            path.unlink()
        raise


def _check_files(input: str, output: str) -> None:
    if input != "-" and (not Path(input).exists() or Path(input).is_dir()):
        raise ModelNotFound(f"{input}: no such file")
    if "-" not in (input, output) and Path(output).exists() and Path(input).samefile(output):
        raise UsageError(f"{output}: is the input")


def _loader(
    model: str,
    names: list[str],
    *,
    max_num_seqs: int,
    max_model_len: int | None,
    threads: int | None,
    yarn: float | None,
    speculation: bool | None,
    dtype: str | None,
    template_defaults: Mapping[str, Any] | None,
) -> Callable[[], tuple[Engine, ServedModel]]:
    """What loads MODEL. Raises QnextError at once where there is none."""
    from qnext.cli._served import load_served, name_of
    from qnext.cli._text_model import open_folder

    folder = open_folder(model, yarn=yarn)
    return lambda: load_served(
        folder, names=[name_of(model), *names], dtype=dtype, threads=threads,
        template_defaults=template_defaults,
        engine_options={"max_num_seqs": max_num_seqs, "max_model_len": max_model_len, "speculation": speculation},
    )  # fmt: skip


@contextmanager
def _progress(input: str) -> Iterator[Callable[[Tally], None]]:
    """A bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda tally: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = None
    if Path(input).is_file():
        with open(input, "rb") as file:
            total = sum(1 for line in file if line.strip())
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def show(tally: Tally) -> None:
            text = f"{tally.tokens_per_second:.0f} tokens/s" + (f", {tally.failed} failed" if tally.failed else "")
            bar.update(task, completed=tally.answered + tally.failed + tally.skipped, description=text)

        yield show
