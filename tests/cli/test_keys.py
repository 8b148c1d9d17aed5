"""`qnext keys`: what a user types, and that a secret is printed once and nowhere else."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest

from qnext.server.access.keys import KeyRing
from tests.cli.command import Capture, Result, run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "keys.json"


def create(capsys: Capture, file: Path, *options: object) -> tuple[str, str]:
    """The new key's id and secret."""
    values = json.loads(run(capsys, "keys", "create", "--name", "made", "--file", file, "--json", *options).out)
    return values["id"], values["secret"]


def test_create_prints_the_secret_alone(capsys: Capture, file: Path) -> None:
    result = run(capsys, "keys", "create", "--name", "build server", "--file", file, "--rpm", 60)
    secret = result.out.strip()
    assert result.code == 0 and result.out == secret + "\n" and secret.startswith("qn-")
    key = KeyRing(file).find(secret)
    assert key is not None and (key.name, key.requests_per_minute, key.expires) == ("build server", 60, None)
    assert key.id in result.err and secret not in result.err and len(result.err.splitlines()) == 1
    assert secret not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_option_reaches_the_key(capsys: Capture, file: Path) -> None:
    before = int(time.time())
    result = run(
        capsys,
        "keys",
        "create",
        "--name",
        "all",
        "--file",
        file,
        "--json",
        "--scope",
        "metrics",
        "--scope",
        "admin",
        "--expires",
        "30d",
        "--rpm",
        1,
        "--tpm",
        2,
        "--max-parallel",
        3,
        "--max-context",
        4,
        "--model",
        "a",
        "--model",
        "b",
    )
    values = json.loads(result.out)
    key = KeyRing(file).find(values["secret"])
    assert key is not None and key.scopes == {"admin", "metrics"} and key.models == ("a", "b")
    assert (key.requests_per_minute, key.tokens_per_minute, key.max_parallel, key.max_context) == (1, 2, 3, 4)
    assert key.expires is not None and before <= key.expires - 30 * 86_400 <= time.time()
    assert "digest" not in values and values["id"] == key.id and values["state"] == "active"


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("12h", 43_200), ("2w", 1_209_600), ("2999-01-31", None)])
def test_when_a_key_expires(capsys: Capture, file: Path, text: str, seconds: int | None) -> None:
    before = int(time.time())
    create(capsys, file, "--expires", text)
    (key,) = KeyRing(file).keys
    assert key.expires is not None
    if seconds is None:
        assert key.expires == 32_474_736_000  # date -u -d 2999-01-31 +%s
    else:
        assert before <= key.expires - seconds <= time.time()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--expires", "soon"], "--expires 'soon'"),
        (["--expires", "2020-01-31"], "not in the future"),
        (["--expires", "0d"], "not in the future"),
        (["--expires", "2027-02-30"], "2027-02-30"),
        (["--expires", "-1d"], "--expires"),
        (["--scope", "root"], "--scope 'root'"),
        (["--rpm", 0], "--rpm"),
        (["--max-context", -1], "--max-context"),
        (["--tpm", 2**60], "tokens_per_minute"),
        (["--model", ""], "models"),
    ],
)
def test_a_wrong_option_is_one_line(capsys: Capture, file: Path, options: list[object], words: str) -> None:
    result = run(capsys, "keys", "create", "--name", "made", "--file", file, *options)
    assert result.code == 2 and words in result.error_line and not file.exists()


def test_a_wrong_name_is_one_line(capsys: Capture, file: Path) -> None:
    for name in ("", "a\nb", "x" * 129):
        result = run(capsys, "keys", "create", "--name", name, "--file", file)
        assert result.code == 2 and "name" in result.error_line


def test_list_and_show(capsys: Capture, file: Path) -> None:
    first, first_secret = create(capsys, file, "--expires", "2999-01-31")
    second, second_secret = create(capsys, file, "--scope", "metrics", "--max-parallel", 5)
    run(capsys, "keys", "revoke", second, "--file", file)
    listed = run(capsys, "keys", "list", "--file", file)
    assert listed.code == 0 and listed.err == ""
    rows = [line.split() for line in listed.out.splitlines()]
    assert rows[0][:4] == ["id", "name", "state", "expires"]
    assert rows[1] == [first, "made", "active", "2999-01-31", "00:00Z", "inference,tokenize", "all", *"----"]
    assert rows[2] == [second, "made", "revoked", "never", "metrics", "all", "-", "-", "5", "-"]
    values = json.loads(run(capsys, "keys", "list", "--file", file, "--json").out)
    assert [row["id"] for row in values] == [first, second] and "digest" not in values[0]
    shown = run(capsys, "keys", "show", second, "--file", file)
    assert "revoked              True" in shown.out and "max_parallel         5" in shown.out
    assert json.loads(run(capsys, "keys", "show", second, "--file", file, "--json").out) == values[1]
    everything = listed.out + shown.out + json.dumps(values)
    assert not any(secret in everything for secret in (first_secret, second_secret))


def test_rotate_and_revoke(capsys: Capture, file: Path) -> None:
    key_id, old = create(capsys, file, "--rpm", 9)
    result = run(capsys, "keys", "rotate", key_id, "--file", file)
    new = result.out.strip()
    ring = KeyRing(file)
    found = ring.find(new)
    assert ring.find(old) is None and found is not None and (found.id, found.requests_per_minute) == (key_id, 9)
    assert new not in result.err
    result = run(capsys, "keys", "revoke", key_id, "--file", file)
    assert (result.code, result.out) == (0, "") and "revoked" in result.err
    assert KeyRing(file).find(new) is None
    for verb in ("rotate", "revoke"):
        again = run(capsys, "keys", verb, key_id, "--file", file)
        assert again.code == 2 and "is revoked" in again.error_line


def test_faults_are_one_line(capsys: Capture, file: Path) -> None:
    def fault(*arguments: object) -> str:
        result: Result = run(capsys, "keys", *arguments, "--file", file)
        assert result.code == 2
        return result.error_line

    assert "no such file" in fault("list") and "no such file" in fault("revoke", "12345678")
    create(capsys, file)
    assert "no key with the id '12345678'" in fault("show", "12345678")
    file.chmod(0o644)
    assert "chmod 600" in fault("list")
    file.chmod(0o600)
    file.write_text("{")
    assert "no JSON" in fault("create", "--name", "x")
    assert run(capsys, "keys", "create", "--name", "x", "--file", file.parent).code == 2
    assert run(capsys, "keys", "create", "--name", "x", "--file", "/proc/none/keys.json").code == 2


def test_the_file_that_is_used_without_an_option(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert run(capsys, "keys", "create", "--name", "x").code == 0
    assert [key.name for key in KeyRing(tmp_path / "qnext" / "keys.json").keys] == ["x"]


def test_help_names_the_commands(capsys: Capture) -> None:
    for arguments in (["--help"], []):
        text = run(capsys, "keys", *arguments).out
        assert all(word in text for word in ("create", "list", "show", "revoke", "rotate"))
    assert run(capsys, "keys", "--help").code == 0
    assert "--max-parallel" in run(capsys, "keys", "create", "--help").out
    assert run(capsys, "keys", "destroy").code == 2
