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

from qnext.server.view.files import page_files
from tests.pace import in_time
from tests.server.hostile.harness import RSS_SLACK, Harness
from tests.server.hostile.mutation import mutated
from tests.server.hostile.surfaces import encoded, surfaces

SURFACES = surfaces()
ALLOWED = (200, 400, 404, 413, 429)
_QUIET = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate, Phase.shrink),
}


def hurl(harness: Harness, name: str, data: st.DataObject) -> None:
    surface = SURFACES[name]
    body = data.draw(mutated(surface))
    where = f"{name}: {str(body)[:2_000]}"

    def attempt() -> float:
        begin = time.perf_counter()
        answer = harness.post(surface, encoded(body))
        seconds = time.perf_counter() - begin
        assert answer.status_code in ALLOWED, f"{where}: {answer.text[:300]}"
        harness.check_answer(answer, surface.style, where)
        return seconds

    in_time(4.0, attempt)


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
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.ignored_auth,
    openapi_checks.unsupported_method,
]


_LENGTHS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
_LONGEST = 16


def shorten(case: Any) -> None:
    """Ask for short answers where the body would have any length: what fills the context may end with a 504."""
    for name in _LENGTHS.get(case.path, ()) if isinstance(case.body, dict) else ():
        value = case.body.get(name)
        if value is None or (isinstance(value, int) and value > _LONGEST):
            case.body[name] = _LONGEST


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
            shorten(case)
            case.call_and_validate(base_url=server.url, headers=headers, checks=_CHECKS, timeout=30)

        run()
    assert num_operations == sum(map(len, document["paths"].values()))
    harness.forgive()
    # What schemathesis keeps of its examples lies in this process too.
    harness.check_rest(slack=RSS_SLACK * (1 + num_examples // 100))
