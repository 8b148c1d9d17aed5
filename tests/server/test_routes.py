"""Every route of both listeners declares what it is, and is what it declares."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from starlette.routing import Route as StarletteRoute

from qnext.server import routes as declared
from qnext.server.access.audit import AuditLog
from qnext.server.access.keys import KeyRing, KeyStore
from qnext.server.access.rates import FailedLogins
from qnext.server.admin import ADMIN_ROUTES
from qnext.server.errors import ErrorStyle
from qnext.server.http.application import make_application
from qnext.server.limits import Limits
from qnext.server.routes import Route
from qnext.server.server import Server
from qnext.server.table import public_routes
from tests.server.hostile.surfaces import surfaces
from tests.server.serving import Running, running_server

PUBLIC = {"/health", "/health/live", "/", "/page/{name:path}"}  # all that answers without a key
ROUTES = [(route, False) for route in public_routes()] + [(route, True) for route in ADMIN_ROUTES]
NAMES = [f"{route.method} {route.path}" for route, _ in ROUTES]
VALID = {surface.path: surface.valid for surface in surfaces().values()}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")
every_route = pytest.mark.parametrize(("route", "is_admin"), ROUTES, ids=NAMES)


@dataclasses.dataclass
class Kept:
    """A server with keys of all kinds, and its audit log."""

    running: Running
    secrets: dict[str, str]  # by what the key may
    audit_path: Path

    def ask(self, route: Route, is_admin: bool, secret: str | None, **more: Any) -> httpx2.Response:
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        base = self.running.admin_url if is_admin else self.running.url
        if route.body is not None:
            more.setdefault("json", VALID[route.path])
        return httpx2.request(
            more.pop("method", route.method),
            base + path_of(route),
            headers=headers | more.pop("headers", {}),
            timeout=30.0,
            **more,
        )

    def lines_of(self, answer: httpx2.Response, number: int) -> list[dict[str, Any]]:
        """The lines of a request, once there are so many: a line is written a moment after its answer."""
        found: list[dict[str, Any]] = []
        for _ in range(500):
            lines = map(json.loads, self.audit_path.read_text().splitlines())
            found = [line for line in lines if line["request_id"] == answer.headers["x-request-id"]]
            if len(found) >= number and not self.running.server.active:
                break
            time.sleep(0.01)
        return found


def path_of(route: Route) -> str:
    for name, value in (("{model:path}", "alias"), ("{name:path}", "index.html"), ("{request_id}", "req-0")):
        route = dataclasses.replace(route, path=route.path.replace(name, value))
    return route.path


@pytest.fixture(scope="module")
def kept(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("kept")
    store = KeyStore(folder / "keys.json")
    secrets = {
        name: store.create(name, scopes=frozenset({name}))[1] for name in ("inference", "tokenize", "metrics", "admin")
    }
    secrets["expired"] = store.create("expired", expires=1)[1]
    key, secrets["revoked"] = store.create("revoked")
    store.revoke(key.id)
    audit = AuditLog(folder / "audit.jsonl")
    keys = KeyRing(folder / "keys.json")
    with running_server(chat_model, keys=keys, audit=audit, limits=Limits(drain_seconds=0.5)) as running:
        yield Kept(running, secrets, folder / "audit.jsonl")


@pytest.fixture(autouse=True)
def forgiven(kept: Kept) -> None:
    """Wrong keys are wanted here."""
    kept.running.call(lambda: setattr(kept.running.server, "logins", FailedLogins()))


def check_error(answer: httpx2.Response, route: Route | None, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"
    error = answer.json()
    if route is not None and route.errors == "anthropic":
        assert error["type"] == "error" and set(error["error"]) == {"type", "message"}
    else:
        assert set(error["error"]) == {"message", "type", "param", "code"}


@every_route
def test_all_is_declared(route: Route, is_admin: bool) -> None:
    assert route.scope in get_args(declared.Scope) and route.limit in get_args(declared.LimitClass)
    assert route.errors in get_args(ErrorStyle) and route.audit in get_args(declared.AuditClass)
    assert (route.scope == "public") == (route.path in PUBLIC)
    assert (route.scope == "admin") == is_admin == route.path.startswith("/admin/")
    assert (route.errors == "anthropic") == route.path.startswith("/v1/messages")
    assert (route.body is not None) == (route.method == "POST" and not is_admin)
    assert route.audit == "request" or route.limit != "generation" or route.path == "/live/stream"
    assert route.summary and route.summary[0].islower()


@pytest.mark.parametrize("is_admin", [False, True])
def test_nothing_runs_that_is_not_declared(is_admin: bool) -> None:
    """The paths of the application are those of the table, once each; no default may be forgotten in a new field."""
    table = list(ADMIN_ROUTES) if is_admin else public_routes()
    guard = make_application(Server(), table)
    found: list[tuple[str, str]] = []
    for entry in guard.application.router.routes:  # type: ignore[attr-defined]
        assert isinstance(entry, StarletteRoute), "a mount or a websocket has no declaration"
        found += [(method, entry.path) for method in entry.methods or () if method != "HEAD"]
    assert sorted(found) == sorted((route.method, route.path) for route in table)
    assert len(set(found)) == len(found)
    without_default = {f.name for f in dataclasses.fields(Route) if f.default is dataclasses.MISSING}
    assert {"scope", "limit", "errors", "audit"} <= without_default


@every_route
def test_a_key_is_needed(kept: Kept, route: Route, is_admin: bool) -> None:
    wrong = (None, "wrong", kept.secrets["expired"], kept.secrets["revoked"])
    if route.scope == "public":
        assert kept.ask(route, is_admin, None).status_code in (200, 404)  # 404: there may be no page
        return
    for secret in wrong:
        answer = kept.ask(route, is_admin, secret)
        check_error(answer, route, 401)
        assert answer.headers["www-authenticate"] == "Bearer"


@every_route
def test_the_scope_is_needed(kept: Kept, route: Route, is_admin: bool) -> None:
    for scope in ("inference", "tokenize", "metrics", "admin"):
        if route.scope not in ("public", "any", scope):
            check_error(kept.ask(route, is_admin, kept.secrets[scope]), route, 403)


@every_route
def test_other_methods_are_refused(kept: Kept, route: Route, is_admin: bool) -> None:
    own = {other.method for other, admin in ROUTES if admin == is_admin and other.path == route.path}
    for method in METHODS:
        if method in own or (method == "HEAD" and "GET" in own and route.limit != "generation"):
            continue
        answer = kept.ask(route, is_admin, kept.secrets["admin"], method=method)
        assert answer.status_code == 405, f"{method}: {answer.status_code}"
        allowed = set(answer.headers["allow"].split(", "))
        assert own <= allowed and method not in allowed
        if method != "HEAD":
            check_error(answer, route, 405)


def test_what_is_not_there(kept: Kept) -> None:
    for path in ("/nothing", "/v1", "/v1/", "/admin/status", "/admin/drain", "/docs", "/v1/chat/completions/"):
        for method in ("GET", "POST"):
            headers = {"Authorization": f"Bearer {kept.secrets['admin']}"}
            check_error(httpx2.request(method, kept.running.url + path, headers=headers), None, 404)
    for route in public_routes():
        check_error(httpx2.request(route.method, kept.running.admin_url + path_of(route)), route, 404)


def right_key(kept: Kept, route: Route) -> str | None:
    scope = "inference" if route.scope == "any" else route.scope
    return None if scope == "public" else kept.secrets[scope]


@every_route
def test_the_audit_log_has_what_is_declared(kept: Kept, route: Route, is_admin: bool) -> None:
    """One line for each, answered or refused, and for "refusals" where it is refused; tokens only of "request"."""
    if route.path in ("/live/stream", "/admin/drain"):
        pytest.skip("has no end, or is the end: its refusals are enough")
    number = 0 if route.audit == "refusals" else 1
    answer = kept.ask(route, is_admin, right_key(kept, route))
    lines = kept.lines_of(answer, number)
    assert len(lines) == number
    refused = kept.ask(route, is_admin, None)
    number = int(refused.status_code >= 400 or route.audit != "refusals")
    assert len(kept.lines_of(refused, number)) == number
    for line in lines:
        assert (line["route"], line["method"], line["status"]) == (route.path, route.method, answer.status_code)
        assert line["key_id"] and (line["prompt_tokens"] is not None) == (route.audit == "request")
        assert "Hi" not in json.dumps(line)


@every_route
def test_a_body_is_read_only_where_one_is_declared(kept: Kept, route: Route, is_admin: bool) -> None:
    if route.body is None:
        return
    secret = right_key(kept, route)
    check_error(kept.ask(route, is_admin, secret, json=[1]), route, 400)
    check_error(kept.ask(route, is_admin, secret, json={}), route, 400)
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        check_error(kept.ask(route, is_admin, secret, headers={"Content-Type": kind}), route, 415)
    for coding in ("gzip", "br", "identity"):
        check_error(kept.ask(route, is_admin, secret, headers={"Content-Encoding": coding}), route, 415)
    too_large = b'{"x":"' + b"a" * kept.running.server.limits.max_body_bytes + b'"}'
    headers = {"Content-Type": "application/json"}
    check_error(kept.ask(route, is_admin, secret, json=None, content=too_large, headers=headers), route, 413)


@pytest.mark.parametrize("state", ["draining", "loading"])
@every_route
def test_the_limit_class_is_enforced(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, route: Route, is_admin: bool, state: str
) -> None:
    """While it drains no generation begins; while it loads only what needs no model answers."""
    if route.path == "/admin/drain":
        pytest.skip("is the end")
    server = kept.running.server
    monkeypatch.setattr(server, "state", state)
    if state == "loading":
        monkeypatch.setattr(server, "_served", None)
    answer = kept.ask(route, is_admin, right_key(kept, route))
    needs = ("generation",) if state == "draining" else ("generation", "work", "light")
    if route.limit in needs:
        check_error(answer, route, 503)
        assert int(answer.headers["retry-after"]) >= 1
    elif route.path in ("/health", "/health/ready"):
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    else:
        assert answer.status_code in (200, 404), answer.text
