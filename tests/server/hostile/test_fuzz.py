"""Random bodies: mutations of valid ones on every surface, and what the OpenAPI document allows and forbids."""

from __future__ import annotations

import time
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from qnext.server.probes import page_files
from tests.server.hostile.harness import Harness, load_factor
from tests.server.hostile.mutation import mutated
from tests.server.hostile.surfaces import encoded, surfaces

SURFACES = surfaces()
ALLOWED = (200, 400, 404, 413, 429)
_QUIET = {
    "deadline": None, "database": None, "derandomize": True,
    "suppress_health_check": list(HealthCheck), "phases": (Phase.generate, Phase.shrink),
}  # fmt: skip


def hurl(harness: Harness, name: str, data: st.DataObject) -> None:
    surface = SURFACES[name]
    body = data.draw(mutated(surface))
    begin = time.perf_counter()
    answer = harness.post(surface, encoded(body))
    seconds = time.perf_counter() - begin
    where = f"{name}: {str(body)[:2_000]}"
    assert answer.status_code in ALLOWED, f"{where}: {answer.text[:300]}"
    harness.check_answer(answer, surface.style, where)
    assert seconds < 4.0 * load_factor(), f"{where}: {seconds:.1f} s"


@pytest.mark.parametrize("name", SURFACES)
def test_mutations(harness: Harness, name: str) -> None:
    @settings(max_examples=20, **_QUIET)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        hurl(harness, name, data)

    run()
    harness.check_rest()


@pytest.mark.slow
@pytest.mark.parametrize("name", SURFACES)
def test_many_mutations(harness: Harness, name: str) -> None:
    @settings(max_examples=2_000, **{**_QUIET, "derandomize": False})
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        hurl(harness, name, data)

    run()
    harness.check_rest()


_CHECKS = [
    checks.not_a_server_error, openapi_checks.status_code_conformance, openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance, openapi_checks.ignored_auth, openapi_checks.unsupported_method,
]  # fmt: skip


@pytest.mark.parametrize("num_examples", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_the_openapi_document_is_kept(harness: Harness, num_examples: int) -> None:
    """Every operation of the document, with requests that it allows."""
    server = harness.running
    document = harness.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    headers = {"Authorization": f"Bearer {harness.attacker}"}
    num_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        num_operations += 1
        if operation.path == "/live/stream" or (operation.path == "/" and not page_files()):
            continue  # the one has no end, and without its files there is no page

        @settings(max_examples=num_examples, **_QUIET)
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            harness.forgive()
            case.call_and_validate(base_url=server.url, headers=headers, checks=_CHECKS, timeout=30)

        run()
    assert num_operations == sum(map(len, document["paths"].values()))
    harness.forgive()
    harness.check_rest()
