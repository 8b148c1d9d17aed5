"""What is suggested where a model is not found."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.checkpoint.nearby import cached_models, published_models
from qnext.checkpoint.resolve import resolve_model
from qnext.errors import ModelNotFound


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/demo/model", "models/80b-int4", "two/one", "two/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "hub" / "models--Acme--Own-Model").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/demo", "runs/demo: holds no model itself; did you mean runs/demo/model?"),
        ("runs/demo/modle", "did you mean runs/demo/model?"),
        ("run/demo/model", "did you mean runs/demo/model?"),
        ("runs/dmo", "did you mean runs/demo/model?"),
        ("{here}/models/80b-int8", "did you mean {here}/models/80b-int4?"),
        ("./models/80b", "no such folder or preset"),
        ("Qwen3-0.6B", "did you mean Qwen/Qwen3-0.6B? `qnext pull Qwen/Qwen3-0.6B` downloads it"),
        ("qwen3-coder-next", "did you mean Qwen/Qwen3-Coder-Next? `qnext pull Qwen/Qwen3-Coder-Next` downloads it"),
        (
            "Qwen/Qwen3-Next-80B-A3B-Instrct",
            "mean {next}? `qnext pull {next}` downloads it".format(next="Qwen/Qwen3-Next-80B-A3B-Instruct"),
        ),
        ("Qwen/Qwen3-0.6B", "not in the local cache; `qnext pull Qwen/Qwen3-0.6B` downloads it"),
        ("org/whatever", "not in the local cache; `qnext pull org/whatever` downloads it"),
        ("acme/own-model", "did you mean Acme/Own-Model?"),
        ("nano5m", "did you mean nano-5m?"),
        ("zzzzzzzz", "zzzzzzzz: no such folder or preset"),
    ],
)
def test_the_message_names_what_was_meant(folders: Path, name: str, message: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(name.replace("{here}", str(folders)))
    text = str(caught.value)
    assert text.endswith(message.replace("{here}", str(folders)))
    assert "\n" not in text


def test_a_folder_without_a_model_is_left_to_whoever_reads_it(folders: Path) -> None:
    assert resolve_model("empty") == Path("empty")
    with pytest.raises(ModelNotFound, match="two: holds no model itself; did you mean two/one"):
        resolve_model("two")


def test_names() -> None:
    assert cached_models() == ["Acme/Own-Model"]
    names = published_models()
    assert len(names) == len(set(names)) and all(name.startswith("Qwen/Qwen3-") for name in names)
