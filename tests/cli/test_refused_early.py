"""What can be known to be wrong is refused before any weights are read; where a server listens is a link that opens."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import qnext.checkpoint
from qnext.cli.serve import print_ready
from qnext.errors import UsageError
from qnext.server.access.keys import KeyRing
from qnext.server.run import Listen, serving
from qnext.server.server import Server
from qnext.session.folder import open_folder
from qnext.session.served import ServeConfig, load_served, name_of, speculation_of

from .command import Capture, run


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("serve MODEL --max-model-len 9999", "must be between 2 and the model's context of 256, not 9999"),
        ("serve MODEL --speculation", "no layer for multi-token prediction"),
        ("serve MODEL --max-num-batched-tokens 1", "max_num_batched_tokens must be at least"),
        ("serve MODEL --disk-cache TMP/file", "prefix cache TMP/file: File exists"),
        ("serve MODEL --disk-cache TMP", "is neither empty nor a prefix cache"),
        ("serve MODEL --disk-cache TMP/new --disk-cache-bytes 0", "max_bytes is 0, must be positive"),
        ("serve MODEL --disk-cache TMP/new --no-enable-prefix-caching", "needs prefix_cache"),
        ("serve MODEL --port TAKEN", "Address already in use; another --port, or 0 for a free one"),
        ("serve MODEL --host no.such.invalid --insecure-no-auth", "cannot listen on no.such.invalid:"),
        ("serve MODEL --admin-port 70000 --admin-api-key x", "--admin-port: must be less than or equal to 65535"),
        ("serve MODEL --ssl-certfile a --ssl-keyfile b", "--ssl-certfile a: no such file"),
        ("serve MODEL --ssl-certfile TMP/file --ssl-keyfile TMP/file", "no certificate that fits"),
        ("serve MODEL --audit-log TMP/none/log", "TMP/none/log: No such file or directory"),
        ("serve MODEL --served-model-name=", "--served-model-name must not be empty"),
        ("serve MODEL --queue-timeout -1", "--queue-timeout: must be greater than"),
        ("serve MODEL --max-body-bytes 0", "--max-body-bytes must be at least 1"),
        ("serve MODEL --yarn 0.5", "--yarn must be between 1 and 64"),
        ("serve MODEL --speculative-config {}x", "must be a JSON object"),
        ('serve MODEL --speculative-config {"method":"ngram"}', "method 'ngram': must be mtp"),
        ('serve MODEL --speculative-config {"model":"x"}', "model: drafts come from the model's own MTP layer"),
        ("chat MODEL --context 9999", "context of 256, not 9999"),
        ("chat MODEL --speculation", "no layer for multi-token prediction"),
        ("chat MODEL --temperature -1", "temperature"),
        ("chat MODEL --dtype float16", "dtype must be float32 or bfloat16"),
        ("generate MODEL text --speculation", "no layer for multi-token prediction"),
        ("generate MODEL text --top-p 2", "top_p"),
        ("generate MODEL text --dtype f16", "dtype must be float32 or bfloat16"),
        ("run-batch MODEL -i TMP/file -o TMP/out --max-model-len 1", "max_model_len must be between 2"),
        ("run-batch MODEL -i TMP/file -o TMP/none/out", "TMP/none/out: No such file or directory"),
        ("logits MODEL --tokens 1 --out TMP", "TMP: is a folder; --out takes the file to write"),
        ("logits MODEL --tokens 99999 --out TMP/o.npy", "id 99999 at place 0 is outside the vocabulary"),
        ("eval MODEL TMP/none", "TMP/none: No such file"),
        ("eval no-such-model TMP/file", "no-such-model: no such folder or preset"),
        ("experts MODEL text --picture TMP/none/p.svg", "no such folder for the picture"),
        ("experts MODEL text --compare no-such-model", "no-such-model: no such folder or preset"),
        ("init nano-5m TMP", "TMP: exists and is not empty"),
    ],
)
def test_no_weights_are_read_for_nothing(
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    plain_folder: Path,
    tmp_path: Path,
    taken: int,
    words: str,
    message: str,
) -> None:
    (tmp_path / "file").write_text("text")

    def load_model(*arguments: object, **options: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(qnext.checkpoint, "load_model", load_model)
    names = {"MODEL": str(plain_folder), "TMP": str(tmp_path), "TAKEN": str(taken)}
    for name, value in names.items():
        words, message = words.replace(name, value), message.replace(name, value)
    result = run(capsys, *words.split())
    assert result.code in (2, 3) and result.out == ""
    last = result.err.splitlines()[-1]
    assert message in last and last.startswith("qnext ")
    assert all("no chat template" in line for line in result.err.splitlines()[:-1])


def test_a_model_that_memory_cannot_hold(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, plain_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("qnext.planning.machine.available_bytes", lambda: 1000)
    for words in (
        ["generate", plain_folder, "x"],
        ["logits", plain_folder, "--tokens", 1, "--out", tmp_path / "o.npy"],
    ):
        result = run(capsys, *words)
        assert result.code == 4
        assert "of memory are free" in result.error_line and "qnext quantize" in result.error_line


def test_speculation_of_others() -> None:
    assert speculation_of(None, '{"method":"qwen3_next_mtp","num_speculative_tokens":2}')["max_draft_tokens"] == 2
    assert speculation_of(None, '{"method":"mtp","num_speculative_tokens":0}') == {"speculation": False}
    with pytest.raises(UsageError, match="between 0 and 8"):
        speculation_of(None, '{"num_speculative_tokens":9}')


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::", "[::1]")])
def test_the_address_that_is_shown_opens(capsys: Capture, plain_folder: Path, host: str, shown: str) -> None:
    def load() -> Any:
        return load_served(open_folder(str(plain_folder)), ServeConfig(["m"], {"max_num_seqs": 1}))

    with serving(lambda: Server(keys=KeyRing(None)), load, Listen(host, 0)) as (server, urls):
        assert urls.public.startswith(f"http://{shown}:")
        assert httpx2.get(f"{urls.public}/health/live").status_code == 200
        port = urls.public.rpartition(":")[2]
        print_ready(server, urls)
    err = capsys.readouterr().err
    assert "0.0.0.0" not in err and "http://[::]" not in err
    elsewhere = f"from other machines: http://{socket.gethostname()}:{port}"
    assert (elsewhere in err) == (host in ("0.0.0.0", "::"))


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cards = {
        "plain": None,
        "named": "---\nlicense: mit\nmodel_name: my-model.v2 \n---\n# x",
        "late": "# x\nmodel_name: no\n",
        "odd": "---\nmodel_name: two words\n---\n",
        "open": "---\nmodel_name: never-closed\n",
        "list": "---\nmodel_name:\n- a\n---\n",
    }
    for name, card in cards.items():
        (tmp_path / name).mkdir()
        if card is not None:
            (tmp_path / name / "README.md").write_text(card)
    found = {name: name_of(name) for name in cards}
    assert found == {**{name: name for name in cards}, "named": "my-model.v2"}
    assert name_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
