"""A server in a thread of this process, on a model folder or on an engine that is a script."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

from qnext.checkpoint import save_model
from qnext.engine import Engine
from qnext.model import CausalLM, initialize
from qnext.server.inference.served import ServedModel
from qnext.server.limits import Limits
from qnext.server.run import Listen, serving
from qnext.server.server import Server
from qnext.session.folder import open_folder
from qnext.session.served import ServeConfig, load_served
from qnext.text.templates import INSTRUCT_TEMPLATE, THINKING_TEMPLATE
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.text_folders import tiny_config

CONTEXT = 2_048
# A client reads all certificates of the machine where it is given no context: 20 ms each time, for servers without TLS.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def save_served(folder: Path, *, thinks: bool = False, context: int = CONTEXT) -> Path:
    """A tiny random model of both kinds of layers, with experts and an MTP layer, one token per byte.

    Kernels take its sizes, so that an answer has the same bits whoever else is served.
    """
    tokenizer = byte_level_tokenizer()
    config = replace(
        tiny_config(tokenizer.get_vocab_size() + 5, eos_token_id=258),
        max_position_embeddings=context,
        hidden_size=32,
        head_dim=32,
        partial_rotary_factor=0.25,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=8,
        num_nextn_predict_layers=1,
    )
    model = CausalLM(config)
    initialize(model, seed=3)
    side = folder.with_name(folder.name + "-tokenizer")
    template = THINKING_TEMPLATE if thinks else INSTRUCT_TEMPLATE
    save_tokenizer(tokenizer, side, model_max_length=context, chat_template=template)
    save_model(model, folder, tokenizer_folder=side, generation_config={"temperature": 0.7, "top_k": 20})
    return folder


@dataclass
class Running:
    """A server that answers at `url`. What belongs to its event loop is reached through `call`."""

    url: str
    admin_url: str
    server: Server
    loop: asyncio.AbstractEventLoop

    def client(self, key: str | None = None, **more: Any) -> httpx2.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=120.0, verify=NO_CERTIFICATES, **more)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the server's event loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(120.0)

    def gauges(self) -> Any:
        return self.server.worker.engine.metrics.gauges


def load_engine(
    folder: Path,
    *,
    disk_cache: Path | None = None,
    disk_cache_bytes: int = 64 << 20,
    adapters: Mapping[str, Path] | None = None,
    expert_memory: int | None = None,
    **engine_options: Any,
) -> tuple[Engine, ServedModel]:
    """As `qnext serve` does, under two names."""
    config = ServeConfig(
        [folder.name, "alias"],
        {"max_num_seqs": 8, **engine_options},
        adapters=adapters or {},
        disk_cache=disk_cache,
        disk_cache_bytes=disk_cache_bytes,
    )
    return load_served(open_folder(str(folder), expert_memory=expert_memory), config)


@contextmanager
def running_server(
    folder: Path, *, limits: Limits | None = None, engine_options: dict[str, Any] | None = None, **server_options: Any
) -> Iterator[Running]:
    """A server on a free port of the loopback interface, with its administrators' listener; drained at the end."""
    listen = Listen(port=0, admin_port=0)
    loops: list[asyncio.AbstractEventLoop] = []

    def new_server() -> Server:
        loops.append(asyncio.get_running_loop())
        return Server(limits=limits or Limits(drain_seconds=1.0), **server_options)

    with serving(new_server, lambda: load_engine(folder, **(engine_options or {})), listen) as (server, urls):
        assert urls.admin is not None
        yield Running(urls.public, urls.admin, server, loops[0])
