"""The catalogue of hostile bodies: in short on some surfaces, in the long form on every one where they apply."""

from __future__ import annotations

import pytest

from tests.server.hostile.cases import Case
from tests.server.hostile.catalogue import CLASSES
from tests.server.hostile.harness import Harness
from tests.server.hostile.surfaces import Surface, surfaces

SURFACES = surfaces()


def suited(case: Case) -> list[Surface]:
    return [surface for surface in SURFACES.values() if case.suits(surface)]


def _turn(number: int, case: Case) -> list[Surface]:
    """One of its surfaces, another one for each number."""
    found = suited(case)
    return [found[number % len(found)]] if found else []


def _short() -> list[object]:
    """What is heavy takes its turn on one of its surfaces."""
    return [
        pytest.param(case, _turn(number, case) if case.is_heavy else suited(case), id=f"{kind}: {case.name}")
        for kind, cases in CLASSES.items()
        if kind != "fields"
        for number, case in enumerate(cases)
    ]


def _long() -> list[object]:
    return [
        pytest.param(case, suited(case), id=f"{kind}: {case.name}") for kind, cases in CLASSES.items() for case in cases
    ]


@pytest.mark.parametrize(("case", "chosen"), _short())
def test_case(harness: Harness, case: Case, chosen: list[Surface]) -> None:
    harness.check(case, chosen)


@pytest.mark.parametrize("field", sorted({case.name.split()[0] for case in CLASSES["fields"]}))
def test_field(harness: Harness, field: str) -> None:
    """All values of a field, each on one surface in turn; what the others notice is looked at after all of them."""
    cases = [case for case in CLASSES["fields"] if case.name.split()[0] == field]
    for number, case in enumerate(cases):
        harness.check(case, _turn(number, case), is_last=False)
    harness.check_rest()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "chosen"), _long())
def test_case_everywhere(harness: Harness, case: Case, chosen: list[Surface]) -> None:
    harness.check(case, chosen)


@pytest.mark.parametrize("surface", SURFACES.values(), ids=list(SURFACES))
def test_the_valid_body_is_valid(harness: Harness, surface: Surface) -> None:
    harness.check(Case("valid", {}, (200,)), [surface])


def test_every_case_is_tried_somewhere() -> None:
    """A field that no surface knows would make its cases say nothing; so would two cases of one name."""
    for kind, cases in CLASSES.items():
        assert [case.name for case in cases if not suited(case)] == [], kind
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), kind
