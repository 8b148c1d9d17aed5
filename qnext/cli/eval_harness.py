"""`qnext eval harness`: tasks of lm-evaluation-harness, and the announcement's tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qnext.cli.flags.examinee import AskedModel, ExamineeFlags, words_of
from qnext.cli.flags.sampling import json_object
from qnext.cli.flags.values import AsJson, Strict, option
from qnext.cli.terminal.text import note
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.harness.run import HarnessRun, HarnessScore
    from qnext.harness.tables import PublishedRow


@dataclass(frozen=True)
class HarnessFlags:
    """What is run."""

    tasks: Annotated[str | None, option("Tasks or groups of lm-eval, with commas.", metavar="NAMES")] = None
    table: Annotated[str | None, option("Rows of the announcement.", metavar="base|instruct|thinking")] = None
    only: Annotated[str | None, option("One row of --table, such as mmlu.", metavar="ROW")] = None
    num_fewshot: Annotated[int | None, option("Examples before a question.", min=0, metavar="N")] = None
    limit: Annotated[int | None, option("Questions of each task at most.", min=1, metavar="N")] = None
    chat: Annotated[bool, option("Ask in the model's chat format.", "--chat")] = False
    gen_kwargs: Annotated[dict | None, option("Sampling of answers.", parser=json_object, metavar="JSON")] = None
    include_path: Annotated[Path | None, option("Tasks of your own in lm-eval's YAML.", metavar="FOLDER")] = None
    metadata: Annotated[
        dict | None,
        option("For tasks that make their data, such as RULER.", parser=json_object, metavar="JSON"),
    ] = None
    run_code: Annotated[bool, option("Let tasks run code that the model wrote, here.", "--run-code")] = False
    seed: Annotated[int, option("Of examples and answers.", metavar="N")] = 1234

    @property
    def folder(self) -> str | None:
        if self.include_path is not None and not self.include_path.is_dir():
            raise UsageError(f"{self.include_path}: no such folder")
        return None if self.include_path is None else str(self.include_path)

    def run(self) -> HarnessRun:
        from qnext.harness.run import HarnessRun

        return HarnessRun(
            words_of(self.tasks or ""),
            self.num_fewshot,
            self.limit,
            self.chat,
            self.gen_kwargs or {},
            self.folder,
            self.run_code,
            self.seed,
            self.metadata or {},
        )


def command(
    model: AskedModel = None,
    *,
    asked: HarnessFlags,
    examinee: ExamineeFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Tasks of lm-evaluation-harness, in this process or against a server, with equal numbers.

    --table runs the rows of the announcement with the settings that were published, and writes the published figure
    beside yours. Without MODEL and --url it lists the rows, each with its command. Needs `pip install 'qnext[eval]'`.
    """
    if (asked.tasks is None) == (asked.table is None) or (asked.only is not None and asked.table is None):
        raise UsageError("give either --tasks, or --table and --only")
    if asked.table is None:
        examinee.check(model)
        from qnext.harness.run import evaluate_tasks

        with _opened(model, examinee, is_chat=asked.chat) as opened:
            scores = evaluate_tasks(opened, asked.run())
        print(json.dumps([score._asdict() for score in scores]) if as_json else _table(scores))
        return
    from qnext.harness.tables import rows_of

    rows = rows_of(asked.table, asked.only)
    found: dict[str, float | None] = {}
    if model is not None or examinee.url is not None:
        examinee.check(model)
        found = _run_rows(rows, model, asked.run(), examinee)
    documents = [_row_document(asked.table, row, found, model or "MODEL") for row in rows]
    print(json.dumps({"table": asked.table, "rows": documents}) if as_json else _rows_table(documents))


def _run_rows(
    rows: Sequence[PublishedRow], model: str | None, asked: HarnessRun, examinee: ExamineeFlags
) -> dict[str, float | None]:
    """A row whose data cannot be had is told, and the others go on; one alone is an error."""
    from qnext.harness.run import evaluate_tasks, run_of, value_of

    found: dict[str, float | None] = {}
    for row in rows:
        if not row.tasks or (row.runs_code and not asked.runs_code):
            why = (
                f"not in lm-eval; run {row.instead}" if not row.tasks else "runs code that the model wrote: --run-code"
            )
            note(f"{row.key}: {why}")
            continue
        try:
            with _opened(model, examinee, is_chat=row.is_chat and bool(row.sampling)) as opened:
                found[row.key] = value_of(row, evaluate_tasks(opened, run_of(row, asked)))
        except UsageError as error:
            if len(rows) == 1:
                raise
            note(str(error))
    return found


@contextmanager
def _opened(model: str | None, examinee: ExamineeFlags, *, is_chat: bool) -> Iterator[Any]:
    """What the harness asks."""
    if examinee.url is not None:
        from qnext.client.remote import model_of, root_of

        _require_harness()
        from qnext.harness.served import served_model

        root = root_of(examinee.url)
        name = model_of(root, examinee.api_key, examinee.served_model_name)
        with examinee.open(None) as remote:
            max_length = remote.max_length
        yield served_model(
            root,
            key=examinee.api_key,
            model=name,
            max_length=max_length,
            concurrency=examinee.max_num_seqs,
            is_chat=is_chat,
        )
        return
    _require_harness()
    with examinee.llm(model) as llm:
        from qnext.harness.model import HarnessModel

        yield HarnessModel(llm)


def _require_harness() -> None:
    """Before a model is loaded, which takes long."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed: pip install 'qnext[eval]'")


def _table(scores: Sequence[HarnessScore]) -> str:
    width = max([len(score.task) for score in scores] + [4])
    lines = [f"{'task':<{width}}  {'metric':<32} {'value':>9} {'± 95 %':>9} {'asked':>6}"]
    for score in scores:
        error = "" if score.error is None else f"{1.96 * score.error:9.4f}"
        lines.append(
            f"{score.task:<{width}}  {score.metric:<32} {score.value:9.4f} {error:>9} {score.num_samples or '':>6}"
        )
    return "\n".join(lines)


def _row_document(table: str, row: PublishedRow, found: dict[str, float | None], model: str) -> dict[str, Any]:
    own = found.get(row.key)
    words = ["qnext", "eval", "harness", model, "--table", table, "--only", row.key]
    return {
        "key": row.key,
        "name": row.name,
        "published": row.published,
        "own": own,
        "settings": {"num_fewshot": row.num_fewshot, "chat": row.is_chat, **row.sampling},
        "command": shlex.join(words + ["--run-code"] * row.runs_code) if row.tasks else None,
        "note": row.note if row.tasks else "",
        "instead": row.instead,
    }


def _rows_table(documents: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'benchmark':<24} {'published':>9} {'here':>7}  how"]
    for each in documents:
        name = each["name"].partition(":")[0]
        published = "-" if each["published"] is None else f"{each['published']:.1f}"
        own = "" if each["own"] is None else f"{each['own']:.1f}"
        how = each["command"] or f"not in lm-eval: {each['instead']}"
        lines.append(f"{name:<24} {published:>9} {own:>7}  {how}")
        if each["note"]:
            lines.append(f"{'':<43}{each['note']}")
    return "\n".join(lines)
