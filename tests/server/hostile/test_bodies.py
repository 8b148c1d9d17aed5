"""The catalogue of hostile bodies: in short on some surfaces, in the long form on every one where they apply."""

from __future__ import annotations

import pytest

from tests.server.hostile.catalogue import CLASSES, Case
from tests.server.hostile.harness import Harness
from tests.server.hostile.surfaces import Surface, surfaces

SURFACES = surfaces()


def suited(case: Case) -> list[Surface]:
    return [surface for surface in SURFACES.values() if case.suits(surface)]


def _params(*, is_long: bool) -> list[object]:
    """(case, surfaces). In short a value of a field, and what is heavy, takes its turn on one of its surfaces."""
    found: list[object] = []
    for kind, cases in CLASSES.items():
        for number, case in enumerate(cases):
            all_of_them = suited(case)
            is_alone = not is_long and (kind == "fields" or case.is_heavy)
            chosen = [all_of_them[number % len(all_of_them)]] if is_alone and all_of_them else all_of_them
            if chosen:
                found.append(pytest.param(case, chosen, id=f"{kind}: {case.name}"))
    return found


@pytest.mark.parametrize(("case", "chosen"), _params(is_long=False))
def test_case(harness: Harness, case: Case, chosen: list[Surface]) -> None:
    harness.check(case, chosen)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "chosen"), _params(is_long=True))
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
