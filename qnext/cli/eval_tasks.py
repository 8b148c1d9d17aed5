"""`qnext eval tasks`: generated tasks with known answers, by length and depth."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qnext.cli.flags.examinee import AskedModel, ExamineeFlags, lengths_of, places_of, words_of
from qnext.cli.flags.values import AsJson, Strict, option
from qnext.cli.terminal.progress import count_progress
from qnext.cli.terminal.text import note
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.eval.ids.scores import IdScore
    from qnext.eval.tasks import SuitePlan, SuiteReport


@dataclass(frozen=True)
class TaskFlags:
    """What is asked."""

    tasks: Annotated[str, option("Names with commas, or all.", metavar="NAMES")] = "all"
    lengths: Annotated[str, option("Tokens of a problem, its answer included.", metavar="1k,4k")] = "1024"
    depths: Annotated[int, option("Places of the fact, evenly from begin to end.", min=1, metavar="N")] = 5
    samples: Annotated[int, option("Problems of each cell.", min=1, metavar="N")] = 10
    facts: Annotated[int, option("Things to remember in one problem.", min=1, metavar="N")] = 4
    queries: Annotated[int, option("Things to ask for where several are.", min=1, metavar="N")] = 2
    seed: Annotated[int, option("Another one, other problems.", metavar="N")] = 0
    ids: Annotated[bool, option("Token ids instead of words, for small models trained on them.", "--ids")] = False
    chat: Annotated[bool, option("Ask in the model's chat format, not as a text to go on with.", "--chat")] = False
    answer_tokens: Annotated[int, option("Tokens beside those of the answer itself.", min=0, metavar="N")] = 8
    likelihood: Annotated[bool, option("Also rank the answer among wrong ones, for weak models.", "--likelihood")] = (
        False
    )
    filler: Annotated[Path | None, option("A text to hide facts in; default: made.", metavar="FILE")] = None

    def plan(self) -> SuitePlan:
        from qnext.eval.tasks import TEXT_TASKS, SuitePlan
        from qnext.text.files import read_user_text

        return SuitePlan(
            kinds=TEXT_TASKS if self.tasks == "all" else words_of(self.tasks),
            lengths=lengths_of(self.lengths),
            depths=places_of(self.depths),
            samples=self.samples,
            num_facts=self.facts,
            num_queries=self.queries,
            seed=self.seed,
            is_chat=self.chat,
            answer_tokens=self.answer_tokens,
            ranks_alternatives=self.likelihood,
            filler="" if self.filler is None else read_user_text(self.filler),
        )


def command(
    model: AskedModel = None,
    *,
    asked: TaskFlags,
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
    if asked.ids:
        _ids(model, asked, examinee, as_json=as_json)
        return
    from qnext.eval.tasks import run_suite

    plan = asked.plan()
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


def _ids(model: str | None, asked: TaskFlags, examinee: ExamineeFlags, *, as_json: bool) -> None:
    """Needs no tokenizer, and no server has this form."""
    if model is None or asked.chat or asked.likelihood or asked.filler is not None:
        raise UsageError("--ids needs MODEL, and goes without --url, --chat, --likelihood and --filler")
    from itertools import islice

    from qnext.eval.ids import ID_TASKS, IdShape, id_problems
    from qnext.eval.ids.scores import evaluate_ids
    from qnext.session.folder import load_weights, open_model

    folder = open_model(model, yarn=examinee.yarn, expert_memory=examinee.expert_memory)
    kinds = list(ID_TASKS) if asked.tasks == "all" else words_of(asked.tasks)
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
