"""Tasks in words with known answers, at any length to the token, for any tokenizer; never named like a published suite.

Nouns: `Examinee` is a model that is asked, here or elsewhere; `TaskShape`, `WordProblem`, `TEXT_TASKS`; `run_suite`
gives a `SuiteReport` of `CellScore`s by task, length and depth. No torch. A new task is a function of recall.py or
growing.py and a line of `TEXT_TASKS`.
"""

from __future__ import annotations

from qnext.eval.tasks.problem import Examinee, TaskShape, WordProblem
from qnext.eval.tasks.run import CellScore, SuitePlan, SuiteReport, run_suite
from qnext.eval.tasks.suite import TEXT_TASKS

__all__ = ["TEXT_TASKS", "CellScore", "Examinee", "SuitePlan", "SuiteReport", "TaskShape", "WordProblem", "run_suite"]
