"""Adapters of a server: a request's model name chooses one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qnext.checkpoint import load_model
from qnext.checkpoint.adapters import save_adapter
from qnext.checkpoint.merge import merge_adapter
from qnext.engine import SamplingParams
from qnext.errors import UsageError
from qnext.lora import LoraConfig, adapter_of
from qnext.session.llm import LLM
from qnext.session.served import named_adapters
from tests.lora.models import with_random_lora

from .serving import Running, running_server

LORAS = {"mixers": LoraConfig("attention", rank=3), "wide": LoraConfig("all", rank=4)}
PROMPT = "def main(argument):\n    return argument * "


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, config in LORAS.items():
        model = load_model(chat_model)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        with_random_lora(model, config)
        save_adapter(adapter_of(model), folders[name], model.config, base=str(chat_model))
    return folders


@pytest.fixture(scope="module")
def adapted_server(chat_model: Path, adapters: dict[str, Path]) -> Iterator[Running]:
    with running_server(chat_model, engine_options={"adapters": adapters}) as running:
        yield running


def complete(server: Running, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0.0, "seed": 1, **more}
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_the_model_name_chooses(
    adapted_server: Running, chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Each answers as the folder into which its adapter is merged, all at once, and again from the prefix cache."""
    folders = {"tiny-chat": chat_model}
    for name, adapter in adapters.items():
        folders[name] = tmp_path / name
        merge_adapter(adapter, folders[name])
    wanted = []
    for folder in folders.values():
        with LLM(folder, max_num_seqs=1) as llm:
            answer = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0.0))
        wanted.append(answer.text)
    assert len(set(wanted)) == 3
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda name: complete(adapted_server, name), folders))
        assert [answer["model"] for answer in found] == list(folders)
        assert [answer["choices"][0]["text"] for answer in found] == wanted


def test_the_list_of_models(adapted_server: Running) -> None:
    with adapted_server.client() as client:
        listed = {model["id"]: model["parent"] for model in client.get("/v1/models").json()["data"]}
        assert listed == {"tiny-chat": None, "alias": None, "mixers": "tiny-chat", "wide": "tiny-chat"}
        assert client.get("/v1/models/wide").json()["root"] == "tiny-chat"
        unknown = client.post("/v1/completions", json={"model": "other", "prompt": "a"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        chat = {"model": "wide", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        assert client.post("/v1/chat/completions", json=chat).json()["model"] == "wide"


def test_names_and_folders() -> None:
    assert named_adapters(["a=x/y", "b=z=1"], ["m"]) == {"a": Path("x/y"), "b": Path("z=1")}
    for wrong in ("a", "=x", "a="):
        with pytest.raises(UsageError, match="NAME=FOLDER"):
            named_adapters([wrong], ["m"])
    for taken in (["m=x"], ["a=x", "a=y"]):
        with pytest.raises(UsageError, match="taken"):
            named_adapters(taken, ["m"])
