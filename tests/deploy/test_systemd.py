"""The unit: verified by systemd where it is there, its promises read here, its flags checked against the program."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.errors import CorruptCheckpoint, DoesNotFit, ModelNotFound, UsageError
from qnext.server.limits import Limits
from qnext.server.run import EXIT_HUNG
from tests.docs.snippets import ROOT, check_arguments

FOLDER = ROOT / "deploy" / "systemd"
TEXT = (FOLDER / "qnext.service").read_text(encoding="utf-8")


def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in TEXT.splitlines():
        if line and not line.startswith(("#", "[")):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


UNIT = directives()


def value(name: str) -> str:
    (one,) = UNIT[name]
    return one


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_verifies_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "qnext.service"
    # The program that it starts need not be installed where it is tested.
    text = TEXT.replace("/opt/qnext/bin/qnext", sys.executable)

    def problems(content: str) -> str:
        unit.write_text(content, encoding="utf-8")
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
        return "\n".join(line for line in done.stderr.splitlines() if "qnext" in line)

    assert problems(text) == ""
    assert "NoSuchThing" in problems(text.replace("NoNewPrivileges", "NoSuchThing"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_calls_its_exposure_low() -> None:
    command = ["systemd-analyze", "security", "--offline=true", str(FOLDER / "qnext.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Unknown option" in done.stderr or "unrecognized option" in done.stderr:
        pytest.skip("this systemd cannot look at a file")
    (level,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert float(level) <= 2.0


def test_flags_exist_in_command_and_file() -> None:
    program, *arguments = shlex.split(value("ExecStart"))
    assert program.endswith("/bin/qnext")
    assert "--config" in arguments
    check_arguments(arguments, folder=FOLDER)


def test_it_starts_again_only_where_that_helps() -> None:
    assert value("Restart") == "on-failure"
    prevented = {int(code) for code in value("RestartPreventExitStatus").split()}
    assert prevented == {kind.exit_code for kind in (UsageError, ModelNotFound, DoesNotFit, CorruptCheckpoint)}
    assert EXIT_HUNG not in prevented


def test_it_waits_longer_than_the_server_drains() -> None:
    words = shlex.split(value("ExecStart"))
    drain = float(words[words.index("--shutdown-timeout") + 1])
    assert drain == Limits().drain_seconds
    assert float(value("TimeoutStopSec")) >= drain + 15
    assert value("KillSignal") == "SIGTERM"


def test_rights() -> None:
    for name, wanted in {
        "DynamicUser": "yes",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "AmbientCapabilities": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "IPAddressDeny": "any",
        "IPAddressAllow": "localhost",
        "SystemCallFilter": "@system-service",
    }.items():
        assert value(name) == wanted, name
    # torch's kernels that are compiled at run time, and the memory plan, need these.
    assert "MemoryDenyWriteExecute" not in UNIT and "ProcSubset" not in UNIT


def test_what_it_writes_lies_in_its_own_folders() -> None:
    words = shlex.split(value("ExecStart"))
    folders = {"--disk-cache": "CacheDirectory", "--audit-log": "LogsDirectory"}
    roots = {"CacheDirectory": "/var/cache/", "LogsDirectory": "/var/log/"}
    for flag, directive in folders.items():
        assert words[words.index(flag) + 1].startswith(f"{roots[directive]}{value(directive)}/")
    assert words[words.index("--keys") + 1] == "${CREDENTIALS_DIRECTORY}/" + value("LoadCredential").split(":")[0]
