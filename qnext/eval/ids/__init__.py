"""Problems of token ids with known answers, at any length, for models without a tokenizer.

Nouns: `IdShape` says how large a problem is, `IdProblem` is one, `IdBatch` several as arrays, `ID_TASKS` the kinds by
name. `scores.py` scores a model; the rest needs no torch. A new kind is a function of `tasks.py` or `states.py` and a
line of `ID_TASKS`.
"""

from __future__ import annotations

from qnext.eval.ids.problem import IGNORED, IdBatch, IdProblem, IdShape
from qnext.eval.ids.suite import ID_TASKS, id_batch, id_problems

__all__ = ["ID_TASKS", "IGNORED", "IdBatch", "IdProblem", "IdShape", "id_batch", "id_problems"]
