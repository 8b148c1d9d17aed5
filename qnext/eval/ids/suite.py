"""The kinds of problems by name, and problems of a kind by number and seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from qnext.errors import UsageError, did_you_mean
from qnext.eval.ids import states, tasks
from qnext.eval.ids.problem import IdBatch, IdProblem, IdShape, batch_of

IdTask = Callable[[random.Random, IdShape], IdProblem]

ID_TASKS: Mapping[str, IdTask] = {
    "needle": tasks.needle,
    "multi-key": tasks.multi_key,
    "multi-value": tasks.multi_value,
    "multi-query": tasks.multi_query,
    "variables": tasks.variables,
    "mqar": tasks.mqar,
    "copy": tasks.copy,
    "parity": states.parity,
    "s3": states.s3,
    "s5": states.s5,
    "addition": states.addition,
}


def id_problems(kind: str, shape: IdShape, *, seed: str) -> Iterator[IdProblem]:
    """Problems without end, the same ones for the same seed. Different seeds, such as "train" and "test 3", share none
    but by chance. Raises UsageError for an unknown kind, and where the shape has no room for it."""
    make = ID_TASKS.get(kind)
    if make is None:
        raise UsageError(f"no task {kind!r}{did_you_mean(kind, ID_TASKS)}; there are {', '.join(ID_TASKS)}")
    source = random.Random(f"{kind}/{shape.length}/{shape.depth}/{seed}")
    while True:
        yield make(source, shape)


def id_batch(kind: str, shape: IdShape, count: int, *, seed: str) -> IdBatch:
    """The first `count` problems as arrays."""
    return batch_of(list(islice(id_problems(kind, shape, seed=seed), count)))
