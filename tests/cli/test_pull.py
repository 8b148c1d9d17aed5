"""`qnext pull` and hub names, with a hub that is not there."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from qnext.checkpoint import resolve_model
from qnext.errors import ModelNotFound

from .command import Capture, make_model, run


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
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "merges.txt", "LICENSE",
        "README.md", "chat_template.jinja",
    ]  # fmt: skip
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


def test_a_full_disk_is_not_a_missing_model(capsys: Capture, install: Any) -> None:
    install(Hub(error=OSError(errno.ENOSPC, "No space left on device", "blob")))
    result = run(capsys, "pull", "org/model")
    assert result.code == 2
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
