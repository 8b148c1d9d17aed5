"""Each limit of a key holds on each route that it is for."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qnext.server.access.keys import Key, KeyRing, KeyStore
from qnext.server.routes import Route
from qnext.server.table import public_routes
from tests.server.hostile.surfaces import Surface, surfaces
from tests.server.serving import Running, running_server

LONG = {"prompt": "On and on", "max_tokens": 1500, "ignore_eos": True, "stream": True}
SURFACES = surfaces()
ASKED = [surface for surface in SURFACES.values() if surface.route.body is not None]  # all that costs something
GENERATING = [surface for surface in ASKED if surface.generates]
OF_ANSWERS = {
    "completions": "max_tokens",
    "chat": "max_completion_tokens",
    "responses": "max_output_tokens",
    "messages": "max_tokens",
}
LEAST = {"responses": 16}  # that the route lets an answer have

of_asked = pytest.mark.parametrize("surface", ASKED, ids=[surface.name for surface in ASKED])
of_generating = pytest.mark.parametrize("surface", GENERATING, ids=[surface.name for surface in GENERATING])

MakeKey = Callable[..., httpx2.Client]


def test_the_table_is_whole() -> None:
    """Every route with a body and every limit of a key stand here."""
    assert {surface.path for surface in ASKED} == {route.path for route in public_routes() if route.body is not None}
    assert {surface.name for surface in GENERATING} == set(OF_ANSWERS)
    limits = {field.name for field in dataclasses.fields(Key)} - {"id", "name", "digest", "created"}
    tested = {"requests_per_minute", "tokens_per_minute", "max_parallel", "max_context", "models", "scopes"}
    assert limits == tested | {"expires", "revoked"}


@pytest.fixture(scope="module")
def kept(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, KeyStore, KeyRing]]:
    path = tmp_path_factory.mktemp("limits") / "keys.json"
    store = KeyStore(path)
    store.create("first")
    ring = KeyRing(path)
    with running_server(chat_model, keys=ring) as running:
        yield running, store, ring


@pytest.fixture
def make_key(kept: tuple[Running, KeyStore, KeyRing]) -> Iterator[MakeKey]:
    """A client with a key of its own, which the server knows at once."""
    running, store, ring = kept
    with contextlib.ExitStack() as stack:

        def make(**limits: Any) -> httpx2.Client:
            _, secret = store.create("limited", **limits)
            assert running.call(ring.reload) is None
            return stack.enter_context(running.client(secret))

        yield make


def ask(client: httpx2.Client, surface: Surface, **more: Any) -> httpx2.Response:
    return client.post(surface.path, json={**surface.valid, **more})


def code_of(answer: httpx2.Response) -> str | None:
    """None where the surface's errors have none."""
    value: str | None = answer.json()["error"].get("code")
    return value


@of_asked
def test_requests_a_minute(make_key: MakeKey, surface: Surface) -> None:
    client = make_key(requests_per_minute=2)
    assert [ask(client, surface).status_code for _ in range(2)] == [200, 200]
    answer = ask(client, surface)
    assert answer.status_code == 429 and code_of(answer) in (None, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"


@contextlib.contextmanager
def running_stream(client: httpx2.Client) -> Iterator[None]:
    with client.stream("POST", "/v1/completions", json=LONG) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()  # kept: a stream closes with its reader
        next(lines)
        yield


@of_asked
def test_requests_at_once(make_key: MakeKey, surface: Surface) -> None:
    client = make_key(max_parallel=1)
    with running_stream(client):
        answer = ask(client, surface)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


@of_generating
def test_tokens_a_minute(make_key: MakeKey, surface: Surface) -> None:
    """What waiting mends is 429, and what it does not is 400; prompts and answers count."""
    answer = ask(make_key(tokens_per_minute=1), surface)
    assert answer.status_code == 400 and "tokens a minute" in answer.text
    client = make_key(tokens_per_minute=60)
    found = []
    for _ in range(60):
        found.append(ask(client, surface))
        if found[-1].status_code != 200:
            break
    assert found[-1].status_code == 429 and len(found) > 1
    assert found[-1].headers["x-ratelimit-limit-tokens"] == "60"


def num_prompt(client: httpx2.Client, surface: Surface) -> int:
    """Tokens of the surface's valid body."""
    usage = ask(client, surface).json()["usage"]
    return int(usage.get("prompt_tokens", usage.get("input_tokens")))


def num_used(answer: httpx2.Response) -> int:
    """Tokens of prompt and answer."""
    usage = answer.json()["usage"]
    return int(
        sum(usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"))
    )


@of_generating
def test_tokens_of_prompt_and_answer_together(make_key: MakeKey, surface: Surface) -> None:
    """An answer of no given length ends inside of the limit, one of a greater length is refused, streamed or not."""
    length = num_prompt(make_key(), surface)
    least = LEAST.get(surface.name, 1)
    room = least + 4
    client = make_key(max_context=length + room)
    field = OF_ANSWERS[surface.name]
    for is_streamed in (False, True):
        for wanted in (room + 1, 2_000_000):
            answer = ask(client, surface, **{field: wanted, "stream": is_streamed})
            assert answer.status_code == 400 and f"must be at most {room}" in answer.text, answer.text
    exact = ask(client, surface, **{field: room}, **forced(surface))
    assert exact.status_code == 200 and num_used(exact) <= length + room
    if surface.name != "messages":  # where it has to be given
        free = client.post(surface.path, json={**without(surface, field), **forced(surface)})
        assert free.status_code == 200 and num_used(free) <= length + room
        if forced(surface):
            assert num_used(free) == length + min(room, 16 if surface.name == "completions" else room)
    none = ask(make_key(max_context=length), surface)
    assert none.status_code == 400 and f"{length} tokens > {length - 1} maximum of this key" in none.text


def forced(surface: Surface) -> dict[str, Any]:
    """What keeps an answer from ending by itself."""
    return {"ignore_eos": True} if surface.knows("ignore_eos") else {}


def without(surface: Surface, field: str) -> dict[str, Any]:
    return {name: value for name, value in surface.valid.items() if name not in (field, "max_tokens")}


@of_generating
def test_several_answers_have_the_limit_each(make_key: MakeKey, surface: Surface) -> None:
    if not surface.knows("n"):
        pytest.skip("one answer only")
    length = num_prompt(make_key(), surface)
    client = make_key(max_context=length + 3)
    answer = client.post(surface.path, json={**without(surface, OF_ANSWERS[surface.name]), **forced(surface), "n": 2})
    assert answer.status_code == 200 and num_used(answer) == length + 2 * 3
    assert ask(client, surface, min_tokens=4, **{OF_ANSWERS[surface.name]: 3}).status_code == 400


def test_a_prompt_beyond_the_limit_of_a_key_is_an_event_for_codex(make_key: MakeKey) -> None:
    """As one beyond the context is: it reads that there alone."""
    client = make_key(max_context=3)
    answer = client.post("/v1/responses", json={**SURFACES["responses"].valid, "stream": True})
    assert answer.status_code == 200 and "response.failed" in answer.text and "maximum of this key" in answer.text


@of_asked
def test_models(make_key: MakeKey, surface: Surface) -> None:
    client = make_key(models=("alias",))
    assert ask(client, surface, model="alias").status_code == 200
    others = ("tiny-chat",) if surface.route.errors == "anthropic" else ("tiny-chat", None)
    for model in others:
        answer = ask(client, surface, model=model)
        assert answer.status_code == 403 and code_of(answer) in (None, "model_not_allowed")


def test_models_that_are_listed(make_key: MakeKey) -> None:
    client = make_key(models=("alias",))
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["alias"]
    assert client.get("/v1/models/alias").status_code == 200
    assert client.get("/v1/models/tiny-chat").status_code == 403
    assert [one["id"] for one in make_key().get("/v1/models").json()["data"]] == ["tiny-chat", "alias"]


NEEDED: list[Route] = [route for route in public_routes() if route.scope != "public"]
of_needed = pytest.mark.parametrize("route", NEEDED, ids=[f"{route.method} {route.path}" for route in NEEDED])


def status_of(client: httpx2.Client, route: Route) -> int:
    body = next((surface.valid for surface in ASKED if surface.path == route.path), None)
    path = route.path.replace("{model:path}", "alias")
    with client.stream(route.method, path, json=body) as answer:
        return int(answer.status_code)


@of_needed
def test_the_scopes_that_a_key_is_made_with(make_key: MakeKey, route: Route) -> None:
    """What tells of others' requests is not among them."""
    status = status_of(make_key(), route)
    assert status == (200 if route.scope in ("any", "inference", "tokenize") else 403)


@of_needed
def test_expiry_and_revocation(
    make_key: MakeKey, kept: tuple[Running, KeyStore, KeyRing], monkeypatch: pytest.MonkeyPatch, route: Route
) -> None:
    running, store, ring = kept
    running.server.logins._burst = 1_000_000
    client = make_key(expires=2**40)
    scopes = ("any", "inference", "tokenize")
    if route.scope in scopes:
        assert status_of(client, route) == 200
    with monkeypatch.context() as patch:
        patch.setattr(ring, "_clock", lambda: 2.0**40)
        assert status_of(client, route) == 401
    store.revoke(store.keys()[-1].id)
    assert running.call(ring.reload) is None
    assert status_of(client, route) == 401


def test_a_limit_is_each_key_s_own(make_key: MakeKey) -> None:
    """One that has used up its requests takes nothing from another."""
    one, other = make_key(requests_per_minute=1), make_key(requests_per_minute=1)
    surface = SURFACES["completions"]
    assert [ask(one, surface).status_code for _ in range(2)] == [200, 429]
    assert ask(other, surface).status_code == 200


def test_requests_at_once_from_many_threads(make_key: MakeKey) -> None:
    """None slips through between the look and the count."""
    client = make_key(max_parallel=2)
    found: list[int] = []

    def one() -> None:
        found.append(client.post("/v1/completions", json={**LONG, "stream": False, "max_tokens": 200}).status_code)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) <= {200, 429} and found.count(429) >= 1
