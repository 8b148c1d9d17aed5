"""The catalogue of hostile bodies, on every surface where they apply."""

from __future__ import annotations

import pytest

from tests.server.hostile.catalogue import CLASSES, Case
from tests.server.hostile.harness import Harness
from tests.server.hostile.surfaces import surfaces

SURFACES = surfaces()
CASES = [pytest.param(case, id=f"{kind}: {case.name}") for kind, cases in CLASSES.items() for case in cases]


@pytest.mark.parametrize("case", CASES)
def test_case(harness: Harness, case: Case) -> None:
    suited = [surface for surface in SURFACES.values() if case.suits(surface)]
    if not suited:
        pytest.skip("no surface of this server knows such a field")
    harness.check(case, suited)


@pytest.mark.parametrize("surface", SURFACES.values(), ids=list(SURFACES))
def test_the_valid_body_is_valid(harness: Harness, surface: object) -> None:
    harness.check(Case("valid", {}, (200,)), [surface])  # type: ignore[list-item]


def test_names_of_cases_are_their_own() -> None:
    for kind, cases in CLASSES.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), kind
