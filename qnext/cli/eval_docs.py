"""`qnext eval docs`: questions about a folder of documents, with citations that are checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.examinee import ExamineeFlags, lengths_of, places_of, words_of
from qnext.cli.flags.values import AsJson, Strict, option
from qnext.cli.terminal.progress import count_progress
from qnext.cli.terminal.text import note

if TYPE_CHECKING:
    from qnext.eval.docs import DocsPlan, DocsReport, SourceDocument
    from qnext.eval.docs.asking import CitedAnswer


@dataclass(frozen=True)
class DocsFlags:
    """What is asked."""

    kinds: Annotated[str, option("Kinds of questions with commas, or all.", metavar="NAMES")] = "all"
    lengths: Annotated[str, option("Tokens of documents, question and answer.", metavar="4k,32k")] = "4096"
    depths: Annotated[int, option("Places of the answer, evenly from begin to end.", min=1, metavar="N")] = 3
    questions: Annotated[int, option("Of each length.", min=1, metavar="N")] = 40
    seed: Annotated[int, option("Another one, other questions.", metavar="N")] = 0
    chat: Annotated[bool, option("Ask in the model's chat format, not as a text to go on with.", "--chat")] = False
    answer_tokens: Annotated[int, option("Tokens of an answer at most.", min=1, metavar="N")] = 64

    def plan(self) -> DocsPlan:
        from qnext.eval.docs import QUESTION_KINDS, DocsPlan

        return DocsPlan(
            kinds=tuple(QUESTION_KINDS) if self.kinds == "all" else words_of(self.kinds),
            lengths=lengths_of(self.lengths),
            depths=places_of(self.depths),
            questions=self.questions,
            seed=self.seed,
            is_chat=self.chat,
            answer_tokens=self.answer_tokens,
        )


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="the documents, or one document")],
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help="Model folder; or --url.")] = None,
    *,
    asked: DocsFlags,
    ask: Annotated[
        str | None, option("Answer this question of yours with citations instead.", metavar="QUESTION")
    ] = None,
    examinee: ExamineeFlags,
    price_in: Annotated[float, option("Of a million tokens of prompts.", min=0.0, metavar="X")] = 0.0,
    price_out: Annotated[float, option("Of a million tokens of answers.", min=0.0, metavar="X")] = 0.0,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Questions whose answers the documents' structure gives, asked with the documents before the model.

    Kinds: section and order (headings), value (of a key), cell (of a table), definition (that holds a line), cloze (a
    rare word), quote (where a line stands). Each answer must name document and line; the report says how often what is
    cited holds the answer. Documents are Markdown, HTML, text, code, and PDF with pypdf.
    """
    examinee.check(model)
    from qnext.eval.docs import make_questions, read_folder, run_docs

    documents, plan = read_folder(folder), asked.plan()
    if ask is None:
        make_questions(documents, kinds=plan.kinds, seed=plan.seed)
    with examinee.open(model) as opened:
        if ask is not None:
            from qnext.eval.docs.asking import ask_documents

            answer = ask_documents(opened, documents, ask, is_chat=plan.is_chat, answer_tokens=plan.answer_tokens)
            print(json.dumps(asdict(answer)) if as_json else _cited(answer))
            return
        with count_progress("questions", plan.questions * len(plan.lengths)) as on_answer:
            report = run_docs(opened, documents, plan, on_answer=on_answer or (lambda asked: None))
    cost = report.cost(price_in=price_in, price_out=price_out)
    if as_json:
        print(json.dumps({"model": model or examinee.url, "cost_per_1k": cost, **report.to_json()}))
    else:
        _show(report, documents, cost)


def _cited(answer: CitedAnswer) -> str:
    """The answer, then what stands at each place that it cites."""
    lines = [answer.text, ""]
    for each in dict.fromkeys(answer.citations):
        lines.append(f"{each.document}:{each.number}  {each.text or 'NOTHING STANDS THERE'}")
    if not answer.citations:
        lines.append("no place is cited")
    if not answer.is_whole:
        note("the documents are longer than the context: the model saw the passages that share words with the question")
    return "\n".join(lines)


def _show(report: DocsReport, documents: list[SourceDocument], cost: dict[str, float]) -> None:
    width = max(len(share.name) for share in report.shares())
    print(f"{len(documents)} documents, {sum(len(document.lines) for document in documents):,} lines")
    print(f"{'':<{width}} {'asked':>6} {'right':>22} {'cited':>7} {'citation holds answer':>22} {'right place':>12}")
    for share in report.shares():
        holds = "-" if share.cited_right is None else share.cited_right.percent()
        print(
            f"{share.name:<{width}} {share.num_questions:6} {share.right.percent():>22} {share.cited.value:7.1%} "
            f"{holds:>22} {share.place.value:12.1%}"
        )
    for length, (median, longest) in report.latencies().items():
        print(f"{length:,} tokens: {median:.2f} s a question (median), {longest:.2f} s at most")
    money = f", {cost['money']:.2f} by the prices" if cost["money"] else ""
    print(
        f"1,000 questions: {cost['prompt_tokens']:,.0f} tokens of prompts, {cost['answer_tokens']:,.0f} of answers, "
        f"{cost['hours']:.2f} hours{money}"
    )
