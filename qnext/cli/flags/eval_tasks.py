"""Which generated tasks are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qnext.cli.flags.examinee import lengths_of, places_of, words_of
from qnext.cli.flags.values import option

if TYPE_CHECKING:
    from qnext.eval.tasks import SuitePlan


@dataclass(frozen=True)
class TaskFlags:
    """How many problems of which length and form."""

    lengths: Annotated[str, option("Tokens of a problem, its answer included.", metavar="1k,4k")] = "1024"
    depths: Annotated[int, option("Places of the fact, evenly from begin to end.", min=1, metavar="N")] = 5
    samples: Annotated[int, option("Problems of each cell.", min=1, metavar="N")] = 10
    facts: Annotated[int, option("Things to remember in one problem.", min=1, metavar="N")] = 4
    queries: Annotated[int, option("Things to ask for where several are.", min=1, metavar="N")] = 2
    seed: Annotated[int, option("Another one, other problems.", metavar="N")] = 0
    chat: Annotated[bool, option("Ask in the model's chat format, not as a text to go on with.", "--chat")] = False
    answer_tokens: Annotated[int, option("Tokens beside those of the answer itself.", min=0, metavar="N")] = 8
    likelihood: Annotated[bool, option("Also rank the answer among wrong ones, for weak models.", "--likelihood")] = (
        False
    )
    filler: Annotated[Path | None, option("A text to hide facts in; default: made.", metavar="FILE")] = None

    def plan(self, tasks: str) -> SuitePlan:
        """`tasks` are names with commas, or all. Raises UsageError."""
        from qnext.eval.tasks import TEXT_TASKS, SuitePlan
        from qnext.text.files import read_user_text

        return SuitePlan(
            kinds=TEXT_TASKS if tasks == "all" else words_of(tasks),
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
