"""A model folder as what a server serves: the engine and the texts. `serve` and `run-batch` share it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnext.cli import _sampling as options
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.cli._text_model import TextFolder
    from qnext.engine import Engine
    from qnext.server.served import ServedModel
    from qnext.text.chat import ChatFormat

# Names of ours and of other servers for the two ways in which models write tool calls; None is the chat format's own.
TOOL_STYLES = {
    "auto": None, "hermes": "json", "json": "json", "qwen25": "json", "qwen": "json",
    "qwen3_coder": "xml", "qwen3_xml": "xml", "xml": "xml",
}  # fmt: skip


_MOST_CARD_HEAD = 4096  # characters of a README.md that are looked at


def load_served(
    folder: TextFolder,
    *,
    names: list[str],
    engine_options: dict[str, Any],
    dtype: str | None = None,
    threads: int | None = None,
    tool_style: Any = None,
    template_defaults: Mapping[str, Any] | None = None,
    with_defaults: bool = True,
    kv_cache_dtype: str = "auto",
    disk_cache: Path | None = None,
    disk_cache_bytes: int = 0,
    warms_grammars: bool = False,
) -> tuple[Engine, ServedModel]:
    """The engine and the texts of a folder; its memory plan goes to stderr. Raises QnextError.

    `warms_grammars`: what compiles output constraints is started meanwhile, and not with the first of them.
    """
    import torch

    from qnext.cli._text_model import end_token_ids, load_weights
    from qnext.engine import DiskCache, Engine, check_options
    from qnext.server.served import ServedModel

    if threads is not None:
        torch.set_num_threads(threads)
    defaults = options.sampling_defaults(folder.path) if with_defaults else {}
    chat_format = _chat_format(folder)
    disk = None if disk_cache is None else DiskCache(disk_cache, max_bytes=disk_cache_bytes)
    check_options(folder.config, disk_cache=disk, **engine_options)
    network = load_weights(folder, dtype)
    eos_ids = end_token_ids(folder.tokenizer, folder.config)
    engine = Engine(
        network, eos_token_ids=eos_ids, kv_dtype=None if kv_cache_dtype == "auto" else getattr(torch, kv_cache_dtype),
        disk_cache=disk, **engine_options,
    )  # fmt: skip
    print(engine.memory_plan.describe(), file=sys.stderr, flush=True)
    served = ServedModel(
        folder.tokenizer, chat_format, names=names, vocab_size=folder.config.vocab_size,
        max_model_len=engine.max_model_len, eos_ids=eos_ids, defaults=defaults, tool_style=tool_style,
        template_defaults=template_defaults,
    )  # fmt: skip
    if warms_grammars:
        served.warm()
    return engine, served


def _chat_format(folder: TextFolder) -> ChatFormat | None:
    from qnext.text.chat import ChatFormat

    try:
        return ChatFormat.for_folder(folder.path, tokenizer=folder.tokenizer)
    except UsageError as error:
        print(f"{error}: /v1/chat/completions is refused, /v1/completions works", file=sys.stderr, flush=True)
        return None


def speculation_of(flag: bool | None, config: str | None) -> dict[str, Any]:
    """Options of the engine that the flag and vLLM's JSON say."""
    if config is None:
        return {"speculation": flag}
    try:
        values = json.loads(config)
        count = values.get("num_speculative_tokens")
    except (ValueError, AttributeError):
        raise UsageError("--speculative-config must be a JSON object") from None
    for key in values.keys() - {"method", "num_speculative_tokens"}:
        raise UsageError(
            f"--speculative-config: {key}: drafts come from the model's own MTP layer, nothing else is known"
        )
    if values.get("method", "mtp") not in ("mtp", "qwen3_next_mtp"):
        raise UsageError(f"--speculative-config: method {values['method']!r}: must be mtp or qwen3_next_mtp")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= 8):
        raise UsageError("--speculative-config: num_speculative_tokens must be between 0 and 8")
    return {"speculation": False} if count == 0 else {"speculation": flag is not False, "max_draft_tokens": count}


def name_of(model: str) -> str:
    """What a server calls MODEL: its hub name, `model_name` of its card (README.md), or the name of its folder."""
    if "/" in model and not Path(model).exists():
        return model
    folder = Path(model).resolve()
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            head = re.match(r"---\n(.*?)^---$", file.read(_MOST_CARD_HEAD), re.DOTALL | re.MULTILINE)
    except OSError:
        return folder.name
    name = head and re.search(r"^model_name: *([\w.-]{1,100}) *$", head[1], re.MULTILINE)
    return name[1] if name else folder.name
