"""`qnext convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.checkpoint import create_folder
from qnext.checkpoint.gguf import export_gguf, read_gguf
from qnext.checkpoint.gguf.container import GgufSpec
from qnext.checkpoint.gguf.writer import GgufWriter, new_file
from qnext.text.gguf import vocabulary_keys
from tests.config.folder import read_config

from .command import CONFIG, Capture, make_model, run


def test_there_and_back(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    file, back = tmp_path / "m.gguf", tmp_path / "back"
    assert run(capsys, "convert", folder, file) == (0, f"{file}\n", "")
    assert read_gguf(file).tensors["blk.0.ssm_out.weight"].block.name == "BF16"
    assert run(capsys, "convert", file, back) == (0, f"{back}\n", "")
    assert run(capsys, "verify", back).code == 0
    assert read_config(back) == read_config(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (back / name).read_text() == (folder / name).read_text()
    tokens = ("--tokens", "1,2,3", "--out")
    for source, out in ((folder, "a.npy"), (back, "b.npy")):
        assert run(capsys, "logits", source, *tokens, tmp_path / out).code == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_types(tmp_path: Path, capsys: Capture, kind: str) -> None:
    file, back = tmp_path / "m.gguf", tmp_path / "back"
    assert run(capsys, "convert", make_model(tmp_path), file, "--type", kind).code == 0
    assert read_gguf(file).tensors["blk.0.ssm_out.weight"].block.name == kind.upper()
    result = run(capsys, "convert", file, back, "--dtype", "float32", "--dequantize")
    assert result.code == 0
    assert ("quantised tensors were made float32" in result.err) == kind.startswith("q")
    assert "rounded" not in result.err
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"


def test_rounding_is_said(tmp_path: Path, capsys: Capture) -> None:
    create_folder(CONFIG, tmp_path / "f32", seed=1, tokenizer_folder=make_model(tmp_path), dtype=_float32())
    file = tmp_path / "m.gguf"
    assert run(capsys, "convert", tmp_path / "f32", file, "--type", "f32").code == 0
    result = run(capsys, "convert", file, tmp_path / "back", "--dtype", "bfloat16")
    assert result.code == 0
    assert "tensors were rounded to bfloat16" in result.err
    assert "rounded" not in run(capsys, "convert", file, tmp_path / "exact").err


def _float32() -> object:
    import torch

    return torch.float32


def split(file: Path, folder: Path) -> list[Path]:
    """The file in two parts."""
    folder.mkdir()
    source = read_gguf(file)
    names = list(source.tensors)
    raw = file.read_bytes()
    paths = []
    for i, part in enumerate((names[:5], names[5:])):
        keys = {**(source.keys if i == 0 else {}), "split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        paths.append(folder / f"m-{i + 1:05d}-of-00002.gguf")
        with new_file(paths[-1]) as stream:
            specs = {name: GgufSpec(source.tensors[name].block, source.tensors[name].shape) for name in part}
            writer = GgufWriter(stream, keys, specs)
            for name in part:
                writer.write(name, [raw[source.tensors[name].start : source.tensors[name].end]])
            writer.finish()
    return paths


def test_a_split_model(tmp_path: Path, capsys: Capture) -> None:
    """The first part, another part, the folder and a pattern stand for the same model."""
    folder = make_model(tmp_path)
    assert run(capsys, "convert", folder, tmp_path / "m.gguf").code == 0
    first, second = split(tmp_path / "m.gguf", tmp_path / "s")
    for i, name in enumerate((first, second, tmp_path / "s", tmp_path / "s" / "m*.gguf")):
        out = tmp_path / f"back{i}"
        assert run(capsys, "convert", name, out) == (0, f"{out}\n", "")
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "back0" / "model.safetensors").read_bytes()
    assert read_config(tmp_path / "back1") == read_config(folder)
    first.unlink()
    result = run(capsys, "convert", second, tmp_path / "none")
    assert result.code == 5
    assert f"{tmp_path / 's'}: m-00001-of-00002.gguf missing, 1 of 2 parts" in result.error_line


def test_a_folder_of_both_forms(tmp_path: Path, capsys: Capture) -> None:
    """OUT says which of the two is meant."""
    folder = make_model(tmp_path)
    assert run(capsys, "convert", folder, folder / "m.gguf").code == 0
    assert run(capsys, "convert", folder, tmp_path / "n.gguf") == (0, f"{tmp_path / 'n.gguf'}\n", "")
    assert run(capsys, "convert", folder, tmp_path / "back") == (0, f"{tmp_path / 'back'}\n", "")


def test_a_file_without_a_vocabulary(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    config = read_config(folder)
    keys = {"tokenizer.ggml.model": "none", "tokenizer.ggml.eos_token_id": config.eos_token_ids[0]}
    export_gguf(folder, tmp_path / "m.gguf", kind="bf16", tokenizer_keys=keys)
    result = run(capsys, "convert", tmp_path / "m.gguf", tmp_path / "back")
    assert result.code == 0
    assert "warning: " in result.err and "holds no vocabulary; the folder gets no tokenizer" in result.err
    assert not (tmp_path / "back" / "tokenizer.json").exists()
    assert run(capsys, "logits", tmp_path / "back", "--tokens", "1,2", "--out", tmp_path / "a.npy").code == 0


def test_warnings_are_one_line_each(tmp_path: Path, capsys: Capture) -> None:
    """An id that neither the configuration nor the vocabulary can use is named once."""
    folder = make_model(tmp_path)
    keys = vocabulary_keys(folder, num_rows=read_config(folder).vocab_size)
    keys |= {"tokenizer.ggml.padding_token_id": 10**6}
    export_gguf(folder, tmp_path / "m.gguf", kind="bf16", tokenizer_keys=keys)
    result = run(capsys, "convert", tmp_path / "m.gguf", tmp_path / "back")
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert line == (
        f"qnext convert: warning: {tmp_path / 'm.gguf'}: key tokenizer.ggml.padding_token_id: 1000000 is no token "
        "and is ignored"
    )


VERBS_WITH_A_MODEL = {
    "generate": ("hi",),
    "chat": (),
    "serve": (),
    "inspect": (),
    "verify": (),
    "logits": ("--tokens", "1", "--out", "x.npy"),
    "quantize": ("out", "--scheme", "int8"),
    "doctor": (),
    "bench": (),
}


@pytest.mark.parametrize("verb", VERBS_WITH_A_MODEL)
def test_a_verb_that_is_given_gguf_says_what_helps(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """For a file of any name, and for a folder of nothing else, as a download of a repository leaves it."""
    monkeypatch.chdir(tmp_path)
    Path("repo").mkdir()
    for path in ("m.gguf", "sha256-0a", "repo/m-Q4_K_M.gguf", "repo/m-Q8_0.gguf", "repo/config.json"):
        Path(path).write_bytes(b"GGUF" + bytes(100))
    for name, file in (("m.gguf", "m.gguf"), ("sha256-0a", "sha256-0a"), ("repo", "repo/m-Q4_K_M.gguf")):
        result = run(capsys, verb, name, *VERBS_WITH_A_MODEL[verb])
        assert result.code == 6, result
        assert f"{name}: GGUF is not run as it is; `qnext convert {file} OUT` makes a folder of it" in result.err
        assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("model", "out", "--type", "f32"), 2, "--type and --dtype are for GGUF files; a folder keeps its numbers"),
        (("model", "out", "--dtype", "float32"), 2, "--type and --dtype are for GGUF files"),
        (("m.gguf", "n.gguf"), 2, "one of the two must be a folder"),
        (("model", "n.gguf", "--records"), 2, "--dtype, --dequantize and --records are for a folder"),
        (("model", "model"), 2, "model: exists and is not empty"),
        (("model", "n.gguf", "--type", "q2"), 2, "--type q2: must be one of f32"),
        (("model", "n.gguf", "--dtype", "float32"), 2, "--dtype, --dequantize and --records are for a folder"),
        (("m.gguf", "out", "--type", "f32"), 2, "--type is for OUT.gguf"),
        (("m.gguf", "out", "--dtype", "int8"), 2, "--dtype int8: must be one of"),
        (("model", "m.gguf"), 2, "m.gguf: exists"),
        (("m.gguf", "model"), 2, "exists and is not empty"),
        (("nothing.gguf", "out"), 3, "nothing.gguf: no such file"),
        (("bad.gguf", "out"), 5, "bad.gguf: no GGUF file but zeros"),
        (("page.gguf", "out"), 5, "page.gguf: no GGUF file but a page of HTML"),
        (("cut.gguf", "out"), 5, "cut.gguf: truncated: "),
        (("weights.gguf", "out"), 6, "weights.gguf: no GGUF file but a safetensors file"),
        (("lora.gguf", "out"), 6, "lora.gguf: a LoRA adapter (adapter), no model"),
        (("llama.gguf", "out"), 6, "key general.architecture: 'llama' is not supported; known: qwen3next"),
        (("m.gguf.part1of2", "out"), 6, "m.gguf.part1of2: a piece of a file that was cut by bytes"),
        (("*.gguf", "out"), 2, "GGUF models: bad.gguf, cut.gguf, "),
        (("80b-a3b", "n.gguf"), 3, "is a preset and has no weights"),
    ],
)
def test_refusals(
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path)
    assert run(capsys, "convert", "model", "m.gguf").code == 0
    Path("bad.gguf").write_bytes(bytes(100))
    Path("page.gguf").write_bytes(b"<html><body>404")
    Path("weights.gguf").write_bytes((2).to_bytes(8, "little") + b"{}")
    raw = Path("m.gguf").read_bytes()
    Path("cut.gguf").write_bytes(raw[: len(raw) // 2])
    Path("m.gguf.part1of2").write_bytes(raw[: len(raw) // 2])
    for name, kind, architecture in (("lora", "adapter", "qwen3"), ("llama", "model", "llama")):
        with new_file(f"{name}.gguf") as file:
            GgufWriter(file, {"general.type": kind, "general.architecture": architecture}, {})
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(capsys, "convert", *arguments)
    assert result.code == code
    assert message in result.error_line
    assert sorted(path.name for path in tmp_path.iterdir()) == before
