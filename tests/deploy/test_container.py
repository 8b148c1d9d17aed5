"""The image and the compose file: what they promise, and that the program has every flag they use."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qnext import __version__
from qnext.server.limits import Limits
from tests.docs.snippets import ROOT, check_arguments

DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
USER = "10001"


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """Of its exec form; raises ValueError for another."""
        return list(json.loads(self.text[self.text.index("[") :]))


def instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [Instruction(name.upper(), rest.strip()) for name, rest in pairs]


def stages(text: str) -> list[list[Instruction]]:
    found: list[list[Instruction]] = [[]]
    for one in instructions(text):
        if one.name == "FROM":
            found.append([])
        found[-1].append(one)
    return found[1:]


def only(stage: list[Instruction], name: str) -> Instruction:
    (found,) = (one for one in stage if one.name == name)
    return found


TEXT = DOCKERFILE.read_text(encoding="utf-8")
BUILD, FINAL = stages(TEXT)


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


@pytest.mark.skipif(hadolint() is None, reason="hadolint is not here")
def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    found = hadolint()
    assert found is not None
    done = subprocess.run([found, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nADD http://x/y /y\nRUN cd /tmp\n", encoding="utf-8")
    assert subprocess.run([found, str(bad)], capture_output=True).returncode != 0


def test_the_last_stage_runs_without_root_and_shell() -> None:
    assert [one.text for one in FINAL if one.name == "USER"] == [f"{USER}:{USER}"]
    assert f"--uid {USER}" in TEXT and f"--gid {USER}" in TEXT
    after = FINAL[[one.name for one in FINAL].index("USER") :]
    assert not [one for one in after if one.name in ("RUN", "COPY", "ADD")]
    assert only(FINAL, "STOPSIGNAL").text == "SIGTERM"
    assert only(FINAL, "ENTRYPOINT").words == ["qnext"]
    check_arguments(only(FINAL, "CMD").words)


def test_no_compiler_and_no_secret_in_the_last_stage() -> None:
    final = " ".join(one.text for one in FINAL)
    assert "g++" in " ".join(one.text for one in BUILD)
    assert not re.search(r"g\+\+|apt-get|pip |--mount", final)
    assert [one.text for one in FINAL if one.name == "COPY"] == ["--from=build /opt/qnext /opt/qnext"]


def test_images_are_named_and_nothing_is_downloaded() -> None:
    everything = instructions(TEXT)
    assert not [one for one in everything if one.name == "ADD"]
    assert not re.search(r"https?://|:latest|--index-url", TEXT)
    images = [one.text.split()[0] for one in everything if one.name == "FROM"]
    assert set(images) == {"${PYTHON_IMAGE}"}
    arguments = dict(one.text.split("=", 1) for one in everything if one.name == "ARG")
    assert re.fullmatch(r"python:3\.\d+-slim", arguments["PYTHON_IMAGE"])


def test_sources_exist_and_pass_the_ignore_file() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {word for one in BUILD if one.name == "COPY" for word in one.text.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    declared = re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared and set(declared) <= copied


def test_the_requirements_that_the_build_reads_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")  # the image has 3.12
    (command,) = re.findall(r'python -c "(import tomllib;[^"]+)"', " ".join(one.text for one in BUILD))
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert done.stdout.splitlines() == project["dependencies"]


def test_health_checks_ask_the_port_of_the_server() -> None:
    probe = only(FINAL, "HEALTHCHECK").words
    assert probe[:3] == ["python", "-I", "-c"] and "/health/live" in probe[3]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["qnext"]
    assert compose["healthcheck"]["test"] == ["CMD", *probe]
    assert only(FINAL, "EXPOSE").text == "8000"


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_the_health_check_says_what_the_server_says(status: int | None, code: int) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert status is not None
            self.send_response(status if self.path == "/health/live" else 404)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.handle_request if status else lambda: None)
        thread.start()
        if status is None:
            server.server_close()
        probe = only(FINAL, "HEALTHCHECK").words[3].replace("8000", str(server.server_port))
        done = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True)
        thread.join()
    assert done.returncode == code


# ---- compose ----

COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICE = COMPOSE["services"]["qnext"]


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


def test_compose_takes_every_right_away() -> None:
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"] and "cap_add" not in SERVICE and "privileged" not in SERVICE
    assert "no-new-privileges:true" in SERVICE["security_opt"]
    assert SERVICE["user"] == f"{USER}:{USER}"
    assert SERVICE["image"] == f"qnext:{__version__}"
    assert all(port.startswith("127.0.0.1:") for port in SERVICE["ports"])
    limits = SERVICE["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory", "pids"}
    assert (DEPLOY / SERVICE["build"]["context"] / SERVICE["build"]["dockerfile"]).resolve() == DOCKERFILE


def test_compose_writes_only_to_volumes() -> None:
    targets = {volume["target"]: volume for volume in SERVICE["volumes"]}
    assert targets["/models"]["read_only"] is True
    written = {flag.split("=")[1] for flag in SERVICE["command"] if re.match(r"--(disk-cache|audit-log)=", flag)}
    assert written == {"/var/cache/qnext", "/var/log/qnext/audit.jsonl"}
    for path in written:
        assert any(path.startswith(target) for target, volume in targets.items() if volume["type"] == "volume")
        # A new volume takes owner and mode of the folder in the image; the disk cache refuses another's folder.
        assert "/var/cache/qnext /var/log/qnext" in TEXT and f"--owner={USER} --group={USER} --mode=0700" in TEXT
    assert {volume["source"] for volume in targets.values() if volume["type"] == "volume"} == set(COMPOSE["volumes"])


def test_compose_gives_flags_that_exist_and_keys_as_a_secret() -> None:
    command = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in SERVICE["command"]]
    check_arguments(command)
    (name,) = SERVICE["secrets"]
    assert f"--keys=/run/secrets/{name}" in command and name in COMPOSE["secrets"]
    assert not [word for word in command if word.startswith("--api-key")]


def test_compose_waits_longer_than_the_server_drains() -> None:
    (drain,) = (float(word.split("=")[1]) for word in SERVICE["command"] if word.startswith("--shutdown-timeout="))
    assert drain == Limits().drain_seconds
    assert seconds(SERVICE["stop_grace_period"]) >= drain + 15


def test_docker_compose_reads_the_file() -> None:
    compose = next((c for c in (["docker", "compose"], ["docker-compose"]) if shutil.which(c[0])), None)
    if compose is None or subprocess.run([*compose, "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not here")
    done = subprocess.run(
        [*compose, "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet"],
        env={"QNEXT_MODEL": "/srv/model", "PATH": "/usr/bin:/usr/local/bin", "HOME": "/tmp"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
