"""`python -O` takes asserts away: no refusal may be one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import json, sys, tempfile
from pathlib import Path
from qnext.server.access.keys import KeyRing
from tests.server.serving import running_server, save_served

if __debug__:
    sys.exit("this is not python -O")
folder = save_served(Path(tempfile.mkdtemp()) / "tiny-chat")
text = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
completion = {"prompt": "Hi", "max_tokens": 2}
found = {}
with running_server(folder, keys=KeyRing(plain=["key"], admin=["admin"])) as one:
    with one.client("key") as client, one.client() as nobody:
        def status(name, path, who=client, **more):
            found[name] = who.post(path, **more).status_code
        status("fine", "/v1/completions", json=completion)
        status("no key", "/v1/completions", nobody, json=completion)
        status("too hot", "/v1/completions", json={**completion, "temperature": 3})
        status("n of 17", "/v1/chat/completions", json={**text, "n": 17})
        status("out of vocabulary", "/v1/completions", json={**completion, "prompt": [999_999]})
        status("too long", "/v1/completions", json={**completion, "prompt": "a" * 5_000})
        status("bad grammar", "/v1/completions", json={**completion, "guided_regex": "("})
        status("an image", "/v1/chat/completions", json={**text, "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]})
        status("nested", "/v1/completions", content="[" * 10_000, headers={"Content-Type": "application/json"})
        status("no JSON", "/v1/completions", content="x", headers={"Content-Type": "application/json"})
        status("too large", "/v1/completions", content="x" * 9_000_000, headers={"Content-Type": "application/json"})
        status("no route", "/admin/drain", json={})
        found["admin"] = client.get(one.admin_url + "/admin/status").status_code
print(json.dumps(found))
"""
_EXPECTED = {
    "fine": 200,
    "no key": 401,
    "too hot": 400,
    "n of 17": 400,
    "out of vocabulary": 400,
    "too long": 400,
    "bad grammar": 400,
    "an image": 400,
    "nested": 400,
    "no JSON": 400,
    "too large": 413,
    "no route": 404,
    "admin": 403,
}


def test_the_server_refuses_without_asserts() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-O", "-c", _PROGRAM], cwd=root, capture_output=True, text=True, timeout=120.0
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert json.loads(done.stdout.splitlines()[-1]) == _EXPECTED
