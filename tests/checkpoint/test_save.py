"""Folders appear whole or not at all, and transformers reads them."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint import save as save_module
from qnext.checkpoint.header import read_index
from qnext.checkpoint.save import new_folder
from qnext.errors import UsageError
from qnext.model import Batch, CausalLM

from .folders import CONFIGS, edit_config, tiny_folder, tiny_model


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module.ShardWriter, "finish", fail)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "m")
    before = _everything(tmp_path)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(save_module.ShardWriter, "finish", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(tiny_model("dense"), folder, overwrite=True)
    assert _everything(tmp_path) == before


def test_existing_folders(tmp_path: Path) -> None:
    model = tiny_model("dense")
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")
    with pytest.raises(UsageError, match="exists and is not empty"):
        save_model(model, tmp_path / "empty")
    other = tiny_model("dense tied")
    save_model(other, tmp_path / "empty", overwrite=True)
    assert load_model(tmp_path / "empty").config == other.config
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds no model, so it is not overwritten"):
        save_model(model, tmp_path / "home", overwrite=True)
    with pytest.raises(UsageError, match="is no folder"):
        save_model(model, tmp_path / "home/letter.txt", overwrite=True)
    save_model(model, tmp_path / "new/deep")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "home", "new"}


def test_new_folder_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with new_folder(tmp_path / "made"):
        pass
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_side_files(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "model.safetensors", "notes.txt"):
        (source / name).write_text(name)
    model = tiny_model("next tied")
    save_model(model, tmp_path / "a", tokenizer_folder=source)
    kept = {path.name for path in (tmp_path / "a").iterdir()}
    assert kept == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
    }
    assert json.loads((tmp_path / "a/generation_config.json").read_text()) == {"eos_token_id": [5, 4]}
    (source / "generation_config.json").write_text('{"top_k": 20}')
    save_model(model, tmp_path / "b", tokenizer_folder=source)
    assert json.loads((tmp_path / "b/generation_config.json").read_text()) == {"top_k": 20}
    save_model(model, tmp_path / "c", tokenizer_folder=source, generation_config={"top_p": 0.5})
    assert json.loads((tmp_path / "c/generation_config.json").read_text()) == {"top_p": 0.5}
    with pytest.raises(UsageError, match=r"no tokenizer.json there"):
        save_model(model, tmp_path / "d", tokenizer_folder=tmp_path)
    assert not (tmp_path / "d").exists()


def test_dtype_on_disk(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path / "m", dtype=torch.bfloat16)
    assert {info.dtype for info in read_index(tmp_path / "m").tensors.values()} == {"BF16"}
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What transformers logs at warning level or above, however it is configured."""
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def _logits(model: CausalLM, ids_T: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(Batch.from_lengths(ids_T, [len(ids_T)])).hidden_TD)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_our_folders_and_we_read_theirs(tmp_path: Path, name: str, messages: list[str]) -> None:
    """No warning, equal logits; then the folder that transformers writes, without MTP, which it drops."""
    from transformers import AutoModelForCausalLM

    ours = tiny_model(name)
    folder = tmp_path / "ours"
    save_model(ours, folder, max_shard_bytes=50_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert messages == []
    ids_T = torch.arange(75) % 300
    with torch.no_grad():
        expected = theirs(ids_T[None]).logits[0]
    torch.testing.assert_close(_logits(ours, ids_T), expected, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    if ours.mtp is not None:
        edit_config(tmp_path / "theirs", num_nextn_predict_layers=None)
    back = load_model(tmp_path / "theirs")
    assert torch.equal(_logits(back, ids_T), _logits(ours, ids_T))
    assert back.mtp is None


@pytest.mark.parametrize("name", ["next tied", "moe", "dense tied"])
def test_a_model_that_transformers_made(tmp_path: Path, name: str) -> None:
    """Initialised and configured by transformers alone, with keys that our writer never writes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qnext.config import to_hf

    values = to_hf(CONFIGS[name])
    values.pop("num_nextn_predict_layers", None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids_T = torch.arange(66) % 300
    with torch.no_grad():
        expected = theirs(ids_T[None]).logits[0]
    torch.testing.assert_close(_logits(load_model(tmp_path / "theirs"), ids_T), expected, rtol=0, atol=1e-4)


def test_a_folder_may_keep_its_own_tokenizer(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    save_model(tiny_model("dense"), folder, overwrite=True, tokenizer_folder=folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert load_model(folder).config == CONFIGS["dense"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
