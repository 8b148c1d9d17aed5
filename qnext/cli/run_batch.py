"""`qnext run-batch`: a file of requests in OpenAI's batch form, answered here or by a running server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags import sampling as options
from qnext.cli.flags.values import ApiKey, Strict, Url, human_int, option
from qnext.cli.terminal.progress import bars, byte_progress
from qnext.cli.terminal.text import note
from qnext.errors import ModelNotFound, UsageError
from qnext.session.placement import AUTO

if TYPE_CHECKING:
    from qnext.client.batch import Tally
    from qnext.session.in_process import Ask

    Begin = Callable[[], AbstractAsyncContextManager[Ask]]


@dataclass(frozen=True)
class BatchModelFlags:
    """How MODEL is served, where no server is asked."""

    served_model_name: Annotated[
        list[str] | None, option("What requests call MODEL, too; repeatable.", metavar="NAME")
    ] = None
    max_num_seqs: Annotated[int, option("Answers of MODEL that are written at once.", min=1, metavar="N")] = 16
    max_model_len: Annotated[
        int | None, option("Tokens of a request in all, such as 32k.", parser=human_int, metavar="N")
    ] = None
    threads: Annotated[int | None, option("CPU threads.", min=1, metavar="N")] = None
    chat_template_kwargs: options.TemplateDefaults = None
    yarn: options.Yarn = None
    expert_memory: options.ExpertMemory = None
    speculation: options.Speculation = None
    dtype: options.DType = None
    device: options.Device = AUTO


def command(
    input: Annotated[str, typer.Option("-i", "--input", metavar="FILE", help="Requests, a line each; - is stdin.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="Answers, a line each; - is stdout.")],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder; or give --url.")] = None,
    *,
    url: Url = None,
    api_key: ApiKey = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", min=1, metavar="N", help="Requests at once; default: twice --max-num-seqs."),
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option("--request-timeout", metavar="X", help="Seconds of a request; default: no end.")
    ] = None,
    served: BatchModelFlags,
    strict: Strict = False,
) -> None:
    """Answer every request of a file: lines {custom_id, method, url, body} become {id, custom_id, response, error}.

    Urls are /v1/chat/completions, /v1/completions, /v1/responses and /v1/messages. Answers are written as they come.
    Run again with the same output file it goes on where it stopped: what was answered is not asked again, what failed
    is. Exits with 1 when some requests failed.
    """
    if (model is None) == (url is None):
        raise UsageError("give either MODEL or --url")
    if model is None and served.chat_template_kwargs is not None:
        raise UsageError("--chat-template-kwargs belongs to MODEL; requests to --url have it in their bodies")
    _check_files(input, output)
    if request_timeout is not None and not request_timeout > 0:
        raise UsageError(f"--request-timeout must be positive, not {request_timeout:g}")
    from qnext.client.batch import Tally, run_batch
    from qnext.client.batch_files import BatchOutput, input_lines, read_requests

    seconds = request_timeout or math.inf
    number = concurrency or 2 * served.max_num_seqs
    tally = Tally()
    begin = _server(url, api_key, number, seconds) if url is not None else _model(str(model), served, seconds)
    lines = list(input_lines(input)) if input == "-" else input_lines(input)
    with BatchOutput(output) as results:
        asking = begin()
        with _progress(input) as on_progress:
            run_batch(read_requests(lines), results, asking, concurrency=number, tally=tally, on_progress=on_progress)
    note(tally.describe())
    if tally.stopped_by is not None:
        note("interrupted; the same command goes on from here")
        raise typer.Exit(128 + tally.stopped_by)
    raise typer.Exit(1 if tally.failed else 0)


def _server(url: str, api_key: str | None, concurrency: int, seconds: float) -> Begin:
    """Raises UsageError at once where it cannot be reached."""
    from qnext.client.batch import ask_server
    from qnext.client.remote import models_of, root_of

    root = root_of(url)
    models_of(root, api_key)
    return partial(ask_server, root, api_key, concurrency=concurrency, request_seconds=seconds)


def _model(model: str, served: BatchModelFlags, seconds: float) -> Begin:
    """Raises QnextError at once where there is none; it is loaded when asked for the first time."""
    from qnext.client.batch_files import MAX_LINE_BYTES
    from qnext.session.folder import open_folder
    from qnext.session.in_process import ask_in_process
    from qnext.session.served import ServeConfig, load_served, name_of

    config = ServeConfig(
        [name_of(model), *(served.served_model_name or ())],
        {
            "max_num_seqs": served.max_num_seqs,
            "max_model_len": served.max_model_len,
            "speculation": served.speculation,
        },
        served.dtype,
        served.threads,
        template_defaults=served.chat_template_kwargs,
    )
    folder = open_folder(model, yarn=served.yarn, expert_memory=served.expert_memory, device=served.device)

    def begin() -> AbstractAsyncContextManager[Ask]:
        loaded = load_served(folder, config, note=note, progress=byte_progress)
        return ask_in_process(*loaded, request_seconds=seconds, max_body_bytes=MAX_LINE_BYTES)

    return begin


def _check_files(input: str, output: str) -> None:
    if input != "-" and (not Path(input).exists() or Path(input).is_dir()):
        raise ModelNotFound(f"{input}: no such file")
    if "-" not in (input, output) and Path(output).exists() and Path(input).samefile(output):
        raise UsageError(f"{output}: is the input")


@contextmanager
def _progress(input: str) -> Iterator[Callable[[Tally], None]]:
    """A bar on stderr where that is a terminal."""
    with bars("MofNCompleteColumn") as shown:
        if shown is None:
            yield lambda tally: None
            return
        total = None
        if Path(input).is_file():
            with open(input, "rb") as file:
                total = sum(1 for line in file if line.strip())
        task = shown.add_task("", total=total)

        def show(tally: Tally) -> None:
            text = f"{tally.tokens_per_second:.0f} tokens/s" + (f", {tally.failed} failed" if tally.failed else "")
            shown.update(task, completed=tally.answered + tally.failed + tally.skipped, description=text)

        yield show
