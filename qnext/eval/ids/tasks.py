"""Recall of token ids: pairs, needles in filler, chains of variables, and copies.

A fact is `SET key value`, a question `ASK key` and then its value. Keys, values and filler have ids of their own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from qnext.eval.ids.problem import ASK, SEPARATOR, SET, Draft, IdProblem, IdShape

_NEAR = 0.4  # exponent of the density of questions: most come soon, as words do that come again in a text


def mqar(source: random.Random, shape: IdShape) -> IdProblem:
    """Multi-query associative recall after Arora and others (2023, arXiv:2312.04927).

    `num_facts` pairs of key and value stand first. `num_queries` different keys come again later among filler, most of
    them soon, each with its value behind it. The facts and the filler need no marks.
    """
    num_pairs, num_queries = shape.num_facts, min(shape.num_queries, shape.num_facts)
    room = shape.length - 2 * (num_pairs + num_queries)
    shape.need(2 * (num_pairs + num_queries), f"recall of {num_pairs} pairs with {num_queries} questions")
    keys = source.sample(shape.part(0, 3, least=num_pairs), num_pairs)
    values = [source.choice(shape.part(1, 3, least=2)) for _ in keys]
    draft = Draft()
    for key, value in zip(keys, values, strict=True):
        draft.add(key, value)
    places = sorted(int((room + 1) * source.random() ** (1 / _NEAR)) for _ in range(num_queries))
    filler = shape.part(2, 3, least=1)
    filled = 0
    for place, pair in zip(places, source.sample(range(num_pairs), num_queries), strict=True):
        draft.add(*_fill(source, filler, place - filled))
        filled = place
        draft.add(keys[pair])
        draft.answer(values[pair])
    draft.add(*_fill(source, filler, room - filled))
    return draft.finish("mqar", shape)


def copy(source: random.Random, shape: IdShape) -> IdProblem:
    """Tokens, a separator, and the same tokens again: as many as the length has room for."""
    shape.need(3, "a copy")
    content = shape.part(0, 1, least=2)
    tokens = [source.choice(content) for _ in range((shape.length - 1) // 2)]
    draft = Draft()
    draft.add(*tokens, SEPARATOR)
    draft.answer(*tokens)
    return draft.finish("copy", shape)


def needle(source: random.Random, shape: IdShape) -> IdProblem:
    """One fact in filler."""
    return _needles("needle", source, shape, num_facts=1, asked=1)


def multi_key(source: random.Random, shape: IdShape) -> IdProblem:
    """Several facts in filler, one of which is asked for."""
    return _needles("multi-key", source, shape, num_facts=shape.num_facts, asked=1)


def multi_query(source: random.Random, shape: IdShape) -> IdProblem:
    """Several facts in filler, `num_queries` of which are asked for."""
    asked = min(shape.num_queries, shape.num_facts)
    return _needles("multi-query", source, shape, num_facts=shape.num_facts, asked=asked)


def multi_value(source: random.Random, shape: IdShape) -> IdProblem:
    """One key with several values, all of which are asked for, in the order in which they stood."""
    (key,) = source.sample(shape.part(0, 3, least=1), 1)
    values = source.sample(shape.part(1, 3, least=shape.num_facts), shape.num_facts)
    draft = Draft()
    room = shape.length - 4 * shape.num_facts - 2
    shape.need(shape.length - room, f"{shape.num_facts} values")
    _scatter(draft, source, shape, [(SET, key, value) for value in values], room)
    draft.add(ASK, key)
    draft.answer(*values)
    return draft.finish("multi-value", shape, shape.depth)


def variables(source: random.Random, shape: IdShape) -> IdProblem:
    """A chain `SET a value`, `SET b a`, ... of `num_facts` links in filler, and a second one to be confused with.

    Asked is the value of the last variable. The links stand in their order.
    """
    hops = shape.num_facts
    names = source.sample(shape.part(0, 3, least=2 * hops), 2 * hops)
    chains = [names[:hops], names[hops:]]
    values = source.sample(shape.part(1, 3, least=2), 2)
    links = [
        [(SET, name, before) for name, before in zip(chain, [value, *chain], strict=False)]
        for chain, value in zip(chains, values, strict=True)
    ]
    which = sorted([0, 1] * hops, key=lambda _: source.random())
    mixed = [links[chain].pop(0) for chain in which]
    room = shape.length - 3 * len(mixed) - 3
    shape.need(shape.length - room, f"two chains of {hops} variables")
    draft = Draft()
    places = sorted(source.randint(0, room) for _ in mixed)
    _lay(draft, source, shape, list(zip(places, mixed, strict=True)), room)
    draft.add(ASK, chains[0][-1])
    draft.answer(values[0])
    return draft.finish("variables", shape)


def _needles(kind: str, source: random.Random, shape: IdShape, *, num_facts: int, asked: int) -> IdProblem:
    keys = source.sample(shape.part(0, 3, least=num_facts), num_facts)
    values = source.sample(shape.part(1, 3, least=max(2, num_facts)), num_facts)
    draft = Draft()
    room = shape.length - 3 * num_facts - 3 * asked
    shape.need(shape.length - room, f"{num_facts} facts with {asked} questions")
    _scatter(draft, source, shape, [(SET, key, value) for key, value in zip(keys, values, strict=True)], room)
    for which in range(asked):
        draft.add(ASK, keys[which])
        draft.answer(values[which])
    return draft.finish(kind, shape, shape.depth)


def _scatter(
    draft: Draft, source: random.Random, shape: IdShape, facts: Sequence[tuple[int, int, int]], room: int
) -> None:
    """Facts among `room` tokens of filler, the first at the depth that is asked for, the others anywhere.

    Facts of one key are values in an order that counts, so they keep it.
    """
    places = [source.randint(0, room) for _ in facts]
    if shape.depth is not None:
        places[0] = round(shape.depth * room)
    if len(facts) > 1 and facts[0][1] == facts[1][1]:
        places.sort()
    _lay(draft, source, shape, sorted(zip(places, facts, strict=True), key=lambda each: each[0]), room)


def _lay(
    draft: Draft,
    source: random.Random,
    shape: IdShape,
    facts: Sequence[tuple[int, tuple[int, int, int]]],
    room: int,
) -> None:
    filler = shape.part(2, 3, least=1)
    filled = 0
    for place, fact in facts:
        draft.add(*_fill(source, filler, place - filled), *fact)
        filled = place
    draft.add(*_fill(source, filler, room - filled))


def _fill(source: random.Random, filler: range, count: int) -> list[int]:
    return source.choices(filler, k=count) if count else []
