"""`qnext eval quant`: what a quantised, merged or tuned folder lost against a reference."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.flags.eval_tasks import TaskFlags
from qnext.cli.flags.sampling import DType
from qnext.cli.flags.values import AsJson, Strict, option
from qnext.cli.terminal.progress import byte_progress
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.eval.agreement import ModelLoss
    from qnext.eval.tasks import SuiteReport


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="the reference, then those to compare with it")],
    *,
    text: Annotated[list[str], option("Files, folders or patterns; may be repeated.", metavar="FILE")],
    sequence_length: Annotated[int, option("Longer files are read in pieces.", min=1, metavar="N")] = 2048,
    dtype: DType = None,
    tasks: Annotated[str | None, option("Generated tasks with commas; else none.", metavar="NAMES")] = None,
    asked: TaskFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Bytes, bits per byte, KL divergence and agreement on texts, and the accuracy in generated tasks, in one table.

    KL is that of the model from the reference, in nats per token. Tasks (--tasks needle,copy; none by default) run
    in the engine, as they are served. `qnext quantize --report` tells the error of each tensor.
    """
    if len(models) < 2:
        raise UsageError("give a reference and at least one model to compare with it")
    from qnext.eval import EvalDocument
    from qnext.eval.agreement import measure_loss
    from qnext.session.folder import load_weights, open_folder
    from qnext.text.any_bytes import encode_bytes
    from qnext.text.files import find_files, read_bytes

    contents = [read_bytes(path) for path in find_files(text)]
    plan = None if tasks is None else asked.plan(tasks)
    folders = [open_folder(model) for model in models]
    tokenizer = folders[0].tokenizer
    for name, folder in zip(models, folders, strict=True):
        if folder.tokenizer.token_table() != tokenizer.token_table():
            raise UsageError(f"{name}: another vocabulary than that of {models[0]}, so no token can be compared")
    end_id = min(tokenizer.eos_ids)
    documents = [EvalDocument([*encode_bytes(data, tokenizer), end_id], len(data)) for data in contents]
    reference = load_weights(folders[0], dtype, progress=byte_progress)
    measure = partial(measure_loss, documents=documents, sequence_length=sequence_length)
    losses = [measure(models[0], reference, num_bytes=folders[0].stored_bytes)]
    for name, folder in zip(models[1:], folders[1:], strict=True):
        other = load_weights(folder, dtype, progress=byte_progress)
        losses.append(measure(name, other, num_bytes=folder.stored_bytes, reference=reference))
        del other
    del reference
    suites = [] if plan is None else [_suite(model, plan, dtype) for model in models]
    if as_json:
        reports = [suite.to_json() for suite in suites] or [{}] * len(losses)
        print(json.dumps([{**asdict(loss), "tasks": r} for loss, r in zip(losses, reports, strict=True)]))
    else:
        print(_table(losses, suites))


def _suite(model: str, plan: Any, dtype: str | None) -> SuiteReport:
    from qnext.eval.tasks import run_suite
    from qnext.session.examinee import LocalExaminee
    from qnext.session.llm import LLM

    with LLM(model, dtype=dtype, max_num_seqs=4) as llm:
        return run_suite(LocalExaminee(llm), plan)


def _table(losses: list[ModelLoss], suites: list[SuiteReport]) -> str:
    width = max(len(loss.name) for loss in losses)
    kinds = suites[0].kinds if suites else ()
    heads = f"{'model':<{width}} {'MB':>9} {'bits/byte':>10} {'change':>8} {'KL':>9} {'same token':>11}"
    lines = [heads + "".join(f"{kind:>14}" for kind in kinds)]
    first = losses[0].perplexity.total.bits_per_byte
    for number, loss in enumerate(losses):
        bits = loss.perplexity.total.bits_per_byte
        change = "" if loss.text is None else f"{bits / first - 1:+.2%}"
        kl, same = ("", "") if loss.text is None else (f"{loss.text.kl_mean:.5f}", f"{loss.text.greedy_agreement:.1%}")
        line = f"{loss.name:<{width}} {loss.num_bytes / 1e6:9.1f} {bits:10.4f} {change:>8} {kl:>9} {same:>11}"
        lines.append(line + "".join(f"{suites[number].total(kind).value:>14.1%}" for kind in kinds))
    low, high = losses[0].perplexity.bits_per_byte[1:]
    total = losses[0].perplexity.total
    lines.append(f"{total.num_documents} files, {total.num_tokens:,} tokens; reference [{low:.4f}, {high:.4f}]")
    if suites:
        lines.append(
            "tasks, 95 %: " + "; ".join(f"{kind} {suites[0].total(kind).percent()} of the reference" for kind in kinds)
        )
    return "\n".join(lines)
