"""`qnext pull` and hub names, with a hub that is not there, or one on this machine."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from qnext.checkpoint import resolve_model
from qnext.checkpoint.hub import download_files
from qnext.cli.pull import file_bars, file_lines
from qnext.errors import ModelNotFound

from .command import Capture, make_model, run
from .local_hub import LocalHub


class Hub:
    """Stands for snapshot_download: remembers the call, fails or gives a folder."""

    def __init__(self, folder: Path | None = None, error: Exception | None = None) -> None:
        self.folder, self.error = folder, error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, **options: Any) -> str:
        self.calls.append((name, options))
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def place(hub: Hub) -> Hub:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        return hub

    return place


def test_path_is_printed(tmp_path: Path, capsys: Capture, install: Any) -> None:
    folder = make_model(tmp_path)
    hub = install(Hub(folder))
    assert run(capsys, "pull", "org/model", tmp_path / "out", "--revision", "v2") == (0, f"{folder}\n", "")
    ((name, options),) = hub.calls
    assert (name, options["revision"], options["local_dir"]) == ("org/model", "v2", tmp_path / "out")


def test_only_safe_files_are_asked_for(tmp_path: Path, capsys: Capture, install: Any) -> None:
    from huggingface_hub.utils import filter_repo_objects

    hub = install(Hub(make_model(tmp_path)))
    run(capsys, "pull", "org/model")
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "merges.txt",
        "LICENSE",
        "README.md",
        "chat_template.jinja",
    ]
    unwanted = ["pytorch_model.bin", "modeling.py", "training_args.bin", "model.gguf", "x.pkl", "run.sh"]
    patterns = hub.calls[0][1]["allow_patterns"]
    assert list(filter_repo_objects(wanted + unwanted, allow_patterns=patterns)) == wanted


def _answer(kind: type[Exception]) -> Exception:
    """An error of the hub without the answer that it describes, whose type differs between versions."""
    return kind.__new__(kind, "refused")


FAILURES = {
    "offline": (errors.LocalEntryNotFoundError("no connection\nand more"), "cannot be downloaded: no connection"),
    "offline mode": (errors.OfflineModeIsEnabled("offline mode"), "cannot be downloaded: offline mode"),
    "connection": (ConnectionError("refused"), "cannot be downloaded: refused"),
    "not found": (_answer(errors.RepositoryNotFoundError), "the hub has no such model"),
    "gated": (_answer(errors.GatedRepoError), "access must be granted"),
    "revision": (_answer(errors.RevisionNotFoundError), "no revision 'v9'"),
    "name": (errors.HFValidationError("bad"), "is not a hub name"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(tmp_path: Path, capsys: Capture, install: Any, name: str) -> None:
    error, message = FAILURES[name]
    install(Hub(error=error))
    result = run(capsys, "pull", "org/model", "--revision", "v9")
    assert result.code == 3
    assert result.error_line.startswith("qnext pull: org/model: ")
    assert message in result.error_line


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Qwen/Qwen3-0.6", _answer(errors.RepositoryNotFoundError), "or it is private; did you mean Qwen/Qwen3-0.6B?"),
        ("qwen/Qwen3-Coder-Nxt", _answer(errors.RepositoryNotFoundError), "did you mean Qwen/Qwen3-Coder-Next?"),
        ("Qwen3-0.6B", None, "looks like organisation/model; did you mean Qwen/Qwen3-0.6B?"),
        ("org/model", errors.LocalEntryNotFoundError("Got: ConnectError: x"), "cannot be reached (ConnectError: x)"),
        (
            "org/model",
            OSError("HTTPSConnectionPool: Max retries exceeded"),
            "with the network back the same command goes",
        ),
    ],
)
def test_a_failure_says_what_helps(
    tmp_path: Path, capsys: Capture, install: Any, name: str, error: Exception | None, message: str
) -> None:
    install(Hub(error=error))
    result = run(capsys, "pull", name, tmp_path / "out")
    assert result.code == 3
    assert message in result.error_line


def test_a_full_disk_is_not_a_missing_model(capsys: Capture, install: Any) -> None:
    install(Hub(error=OSError(errno.ENOSPC, "No space left on device", "blob")))
    result = run(capsys, "pull", "org/model")
    assert result.code == 4
    assert "No space left on device" in result.error_line


def test_no_weights_there(tmp_path: Path, capsys: Capture, install: Any) -> None:
    (tmp_path / "README.md").write_text("a data set")
    install(Hub(tmp_path))
    result = run(capsys, "pull", "org/data")
    assert result.code == 3
    assert "holds no safetensors files" in result.error_line


def test_out_is_a_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out").write_text("")
    result = run(capsys, "pull", "org/model", tmp_path / "out")
    assert (result.code, "exists and is no folder" in result.error_line) == (2, True)


def test_hub_names_are_looked_up_in_the_cache_only(tmp_path: Path, install: Any) -> None:
    hub = install(Hub(tmp_path))
    assert resolve_model("org/model") == tmp_path
    assert hub.calls == [("org/model", {"local_files_only": True})]
    install(Hub(error=errors.LocalEntryNotFoundError("no")))
    with pytest.raises(ModelNotFound, match="`qnext pull org/model` downloads it"):
        resolve_model("org/model")


def test_folders_win_and_other_names_never_reach_the_hub(
    tmp_path: Path, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = install(Hub(tmp_path))
    (tmp_path / "nano-5m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("nano-5m") == Path("nano-5m")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("mini-90m", "is a preset and has no weights"),
        ("file", "is a file"),
        ("a/b/c", "no such folder or preset"),
        ("../org/model", "no such folder"),
        ("nothing", "no such folder"),
    ):
        with pytest.raises(ModelNotFound, match=message):
            resolve_model(name)
    assert hub.calls == []


ROOT = Path(__file__).parents[2]


def pull(hub: LocalHub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the address of the hub is read once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "qnext", "pull", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
        check=False,
    )


def test_lines_for_programs(tmp_path: Path) -> None:
    """A download that breaks off goes on where it was; one that is complete is not repeated."""
    folder = make_model(tmp_path)
    (folder / "model.py").write_text("no code")
    (folder / "big.json").write_bytes(os.urandom(25 << 20))  # more than huggingface_hub takes at a time
    with LocalHub(folder, broken="big.json").running() as hub:
        done = pull(hub, tmp_path / "home", "org/model", "--json")
        assert done.returncode == 0, done.stderr
        *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
        again = pull(hub, tmp_path / "home", "org/model", "--json")
    wanted = {name: len(data) for name, data in hub.files.items() if name != "model.py"}
    seen: dict[str, list[int]] = {}
    for line in lines:
        assert line["total"] == wanted[line["file"]]
        seen.setdefault(line["file"], []).append(line["completed"])
    assert {name: counts[-1] for name, counts in seen.items()} == wanted
    assert all(counts == sorted(counts) and counts[0] == 0 for counts in seen.values())
    first, second = [start for name, start in hub.ranges if name == "big.json"]
    assert first == 0 < second < wanted["big.json"]
    assert sorted(path.name for path in Path(last["folder"]).iterdir()) == sorted([*wanted, "provenance.json"])
    assert (Path(last["folder"]) / "big.json").read_bytes() == hub.files["big.json"]
    assert len(hub.ranges) == len(wanted) + 1
    assert {line["file"]: line["completed"] for line in map(json.loads, again.stdout.splitlines()[:-1])} == wanted


def test_a_pipe_sees_the_folder_alone(tmp_path: Path) -> None:
    with LocalHub(make_model(tmp_path)).running() as hub:
        done = pull(hub, tmp_path / "home", "org/model", tmp_path / "out")
        missing = pull(hub, tmp_path / "home", "org/other", "--json")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert (tmp_path / "out" / "config.json").read_bytes() == hub.files["config.json"]
    assert (missing.returncode, missing.stdout) == (3, "")
    assert "the hub has no such model" in missing.stderr.splitlines()[-1]


def test_a_repository_of_gguf_files(tmp_path: Path) -> None:
    """Nothing but the small files is downloaded, and the next two commands are named."""
    (tmp_path / "hub").mkdir()
    for name in ("README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf"):
        (tmp_path / "hub" / name).write_bytes(b"GGUF" * 100)
    with LocalHub(tmp_path / "hub").running() as hub:
        done = pull(hub, tmp_path / "home", "org/model", tmp_path / "out")
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1] == (
        "qnext pull: org/model: holds GGUF files and no safetensors; `hf download org/model m-Q4_K_M.gguf "
        "--local-dir DIR`, then `qnext convert DIR/m-Q4_K_M.gguf OUT`"
    )
    assert {name for name, _ in hub.ranges} == {"README.md"}


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with file_bars() as report:
        assert report is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with file_bars() as report:
        assert report is not None
        report("a.safetensors", 0, 4000)
        report("a.safetensors", 1000, 4000)
        report("b.json", 100, 100)
    drawn = capsys.readouterr().err
    assert "a.safetensors" in drawn
    assert "1.1/4.1 kB" in drawn  # all files
    assert "b.json" not in drawn


def test_lines_are_few(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with file_lines() as report:
        for completed in range(101):
            report("a", completed, 100)
        report("a", 100, 100)
    assert [json.loads(line)["completed"] for line in capsys.readouterr().out.splitlines()] == [0, 100]


def test_a_file_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for the network must not keep a program that was to stop."""
    infos = [
        huggingface_hub.DryRunFileInfo("c", 10, name, "", is_cached=False, will_download=True)
        for name in ("bad", "slow")
    ]
    ended: list[str] = []
    is_slow_running = threading.Event()

    def download(name: str, filename: str, *, tqdm_class: Any, **options: Any) -> None:
        if filename == "bad":
            is_slow_running.wait(10)
            raise ConnectionError("reset")
        with tqdm_class(total=10, unit="B") as bar:
            is_slow_running.set()
            try:
                for _ in range(10_000):
                    bar.update(0)
                    time.sleep(0.001)
            except KeyboardInterrupt:
                ended.append(filename)
                raise

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names, **options: infos)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConnectionError, match="reset"):
        download_files("org/model", None, None, ["*"], lambda file, completed, total: None)
    assert ended == ["slow"]
