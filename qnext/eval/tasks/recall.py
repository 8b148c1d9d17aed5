"""Facts in filler, and questions for them: one or several keys, values and questions, and chains of variables."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qnext.eval.tasks import words
from qnext.eval.tasks.problem import Expected, TaskShape, TaskText

NUM_ALTERNATIVES = 7
_NUMBER = r"\d+"
_INTRO = "Some secret numbers are hidden in the following text. Remember them; you will be asked for them.\n\n"


def needle(source: random.Random, shape: TaskShape) -> TaskText:
    """One number of one name."""
    return _of_names(source, num_facts=1, asked=1)


def multi_key(source: random.Random, shape: TaskShape) -> TaskText:
    """Numbers of several names, one of which is asked for. The others are among the alternatives."""
    return _of_names(source, num_facts=shape.num_facts, asked=1)


def multi_query(source: random.Random, shape: TaskShape) -> TaskText:
    """Numbers of several names, some of which are asked for in one question."""
    return _of_names(source, num_facts=shape.num_facts, asked=min(shape.num_queries, shape.num_facts))


def multi_value(source: random.Random, shape: TaskShape) -> TaskText:
    """Several numbers of one name, all asked for, in any order."""
    (name,) = words.names(source, 1)
    values = words.numbers(source, shape.num_facts)
    facts = tuple(f"A secret number of {name} is {value}. " for value in values)
    question = f"Which are the {len(values)} secret numbers of {name} in the text above? Answer with the numbers alone."
    expected = Expected(tuple(values), _NUMBER, False, _others(source, values), ", ")
    return TaskText(_INTRO, facts, question, f"The {len(values)} secret numbers of {name} are", expected, True)


def variables(source: random.Random, shape: TaskShape) -> TaskText:
    """A chain of assignments of `num_facts` links, and a second one to be confused with. The links stand in order."""
    hops = shape.num_facts
    names = words.codes(source, 2 * hops)
    chains = [names[:hops], names[hops:]]
    values = words.numbers(source, 2, digits=5)
    links = [
        [
            f"Variable {name} is set to {value if number == 0 else 'the value of ' + chain[number - 1]}. "
            for number, name in enumerate(chain)
        ]
        for chain, value in zip(chains, values, strict=True)
    ]
    which = sorted([0, 1] * hops, key=lambda _: source.random())
    facts = tuple(links[chain].pop(0) for chain in which)
    last = chains[0][-1]
    question = f"What number is the value of variable {last} in the end? Answer with the number alone."
    others = (values[1], *words.numbers(source, NUM_ALTERNATIVES - 1, digits=5))
    expected = Expected((values[0],), _NUMBER, True, others)
    intro = "Some variables are set in the following text. Remember their values.\n\n"
    return TaskText(intro, facts, question, f"The value of variable {last} is", expected, True)


def _of_names(source: random.Random, *, num_facts: int, asked: int) -> TaskText:
    names, values = words.names(source, num_facts), words.numbers(source, num_facts)
    facts = tuple(f"The secret number of {name} is {value}. " for name, value in zip(names, values, strict=True))
    wanted = _listed(names[:asked])
    if asked == 1:
        question = f"What is the secret number of {wanted} in the text above? Answer with the number alone."
        begun = f"The secret number of {wanted} is"
        decoys = values[1 : 1 + NUM_ALTERNATIVES]
        others = (*decoys, *words.numbers(source, NUM_ALTERNATIVES - len(decoys)))
    else:
        question = f"What are the secret numbers of {wanted} in the text above? Answer with the numbers in this order."
        begun = f"The secret numbers of {wanted} are"
        others = _others(source, values[:asked])
    return TaskText(_INTRO, facts, question, begun, Expected(tuple(values[:asked]), _NUMBER, True, others))


def _listed(names: Sequence[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


def _others(source: random.Random, values: Sequence[str]) -> tuple[str, ...]:
    """As many numbers in a list, one of which is wrong."""
    found = []
    for wrong in words.numbers(source, NUM_ALTERNATIVES):
        changed = list(values)
        changed[source.randrange(len(values))] = wrong
        found.append(", ".join(changed))
    return tuple(found)
