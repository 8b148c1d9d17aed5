"""`qnext eval tasks`: generated tasks with known answers, by length and depth."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qnext.cli.flags.eval_tasks import TaskFlags
from qnext.cli.flags.examinee import AskedModel, ExamineeFlags, lengths_of, words_of
from qnext.cli.flags.values import AsJson, Strict, option
from qnext.cli.terminal.progress import count_progress
from qnext.cli.terminal.text import note
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.eval.ids.scores import IdScore
    from qnext.eval.tasks import SuiteReport


def command(
    model: AskedModel = None,
    *,
    tasks: Annotated[str, option("Names with commas, or all.", metavar="NAMES")] = "all",
    asked: TaskFlags,
    ids: Annotated[bool, option("Token ids instead of words, for small models trained on them.", "--ids")] = False,
    examinee: ExamineeFlags,
    picture: Annotated[Path | None, option("Write heat maps, .svg or .png.", metavar="FILE")] = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Problems with known answers, made by a seed at any length to the token, and the share that is answered exactly.

    Facts hidden in filler: needle, multi-key, multi-value, multi-query, variables. As long as what they ask about:
    pairs, copy, parity, boxes3, boxes5, addition. Intervals are of 95 % (Wilson). With --ids: the same kinds and mqar,
    s3, s5 of token ids alone, scored by the likeliest token.
    """
    examinee.check(model)
    if picture is not None:
        from qnext.diagnostics.heatmap import check_picture

        check_picture(picture)
    if ids:
        _ids(model, tasks, asked, examinee, as_json=as_json)
        return
    from qnext.eval.tasks import run_suite

    plan = asked.plan(tasks)
    with examinee.open(model) as opened, count_progress("cells", len(list(plan.cells()))) as on_cell:
        report = run_suite(opened, plan, on_cell=on_cell or (lambda cell: None))
    if picture is not None:
        _draw(picture, report, f"{model or examinee.url}: exact answers by length and depth")
    print(
        json.dumps({"model": model or examinee.url, "plan": asdict(plan), **report.to_json()})
        if as_json
        else report.table()
    )


def _draw(path: Path, report: SuiteReport, title: str) -> None:
    from qnext.diagnostics.depth_map import maps_of, write_depth_maps

    write_depth_maps(path, maps_of(report), title=title)
    note(str(path))


def _ids(model: str | None, tasks: str, asked: TaskFlags, examinee: ExamineeFlags, *, as_json: bool) -> None:
    """Needs no tokenizer, and no server has this form."""
    if model is None or asked.chat or asked.likelihood or asked.filler is not None:
        raise UsageError("--ids needs MODEL, and goes without --url, --chat, --likelihood and --filler")
    from itertools import islice

    from qnext.eval.ids import ID_TASKS, IdShape, id_problems
    from qnext.eval.ids.scores import evaluate_ids
    from qnext.session.folder import load_weights, open_model

    folder = open_model(model, yarn=examinee.yarn, expert_memory=examinee.expert_memory, device=examinee.device)
    kinds = list(ID_TASKS) if tasks == "all" else words_of(tasks)
    shapes = [
        IdShape(folder.config.vocab_size, length, asked.facts, asked.queries) for length in lengths_of(asked.lengths)
    ]
    problems = [
        list(islice(id_problems(kind, shape, seed=str(asked.seed)), asked.samples))
        for kind in kinds
        for shape in shapes
    ]
    loaded = load_weights(folder, examinee.dtype)
    scores = [evaluate_ids(loaded, some) for some in problems]
    print(json.dumps({"model": model, "scores": [asdict(score) for score in scores]}) if as_json else _id_table(scores))


def _id_table(scores: list[IdScore]) -> str:
    lines = [f"{'task':<12} {'length':>8} {'all answers right':>24} {'single answers':>24} {'nats':>7} {'rank':>8}"]
    lines += [
        f"{score.kind:<12} {score.length:>8} {score.exact.percent():>24} {score.answers.percent():>24} "
        f"{score.nats_per_answer:7.3f} {score.mean_rank:8.1f}"
        for score in scores
    ]
    return "\n".join(lines)
