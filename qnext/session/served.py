"""A model folder, opened for a server: the engine, and the text side of the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnext.errors import UsageError, warn
from qnext.session.folder import (
    EngineOpening,
    ProgressOf,
    TextFolder,
    chat_format_of,
    end_token_ids,
    load_weights,
    no_progress,
    place_model,
)
from qnext.session.opening import open_engine
from qnext.session.rank_options import ONE_PROCESS, RankOptions
from qnext.session.sampling import sampling_defaults
from qnext.session.talk import drop
from qnext.version import __version__

if TYPE_CHECKING:
    from qnext.checkpoint.identity import FolderIdentity
    from qnext.engine import Engine, EngineConfig
    from qnext.lora.adapt import Adapter
    from qnext.model import CausalLM
    from qnext.server.inference.origin import AnswerOrigin
    from qnext.server.inference.served import ServedModel

_MOST_CARD_HEAD = 4096  # characters of a README.md that are looked at


@dataclass(frozen=True)
class ServeConfig:
    """How a folder is served. `names` are the model names that requests may use. `engine` holds options of the engine
    by name.

    `kv_cache_dtype` auto means the model's dtype. `with_defaults`: generation_config.json counts where a request says
    nothing. `tool_style` and `template_defaults` are those of ServedModel. `warms_grammars`: the process that compiles
    output constraints starts with the server, and not with the first constraint.
    """

    names: Sequence[str]
    engine: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    threads: int | None = None
    kv_cache_dtype: str = "auto"
    adapters: Mapping[str, Path] = field(default_factory=dict)  # folders by the names that requests may use
    disk_cache: Path | None = None
    disk_cache_bytes: int = 0
    with_defaults: bool = True
    template_defaults: Mapping[str, Any] | None = None
    tool_style: Any = None
    warms_grammars: bool = False
    ranks: RankOptions = ONE_PROCESS
    marking: Any = None  # of answers by a watermark: a Marking


def load_served(
    folder: TextFolder,
    config: ServeConfig,
    *,
    note: Callable[[str], None] = drop,
    progress: ProgressOf = no_progress,
) -> tuple[Engine, ServedModel]:
    """The engine and the text side of a folder. `note` is told the memory plan. Raises QnextError."""
    import torch

    from qnext.checkpoint.adapters import find_adapter, read_adapter
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.identity import identity_of
    from qnext.engine import DiskCache, EngineConfig, check_options
    from qnext.ops import arithmetic_of
    from qnext.server.inference.served import ServedModel

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.ranks.num_ranks > 1:
        _check_on_ranks(config)
    adapters = {name: find_adapter(path) for name, path in config.adapters.items()}
    text = _text_side(folder, adapters, note)
    defaults = sampling_defaults(text.path) if config.with_defaults else {}
    chat_format = chat_format_of(text, note, without="/v1/chat/completions is refused, /v1/completions works")
    path = config.disk_cache
    disk = None if path is None else DiskCache(path, max_bytes=config.disk_cache_bytes)
    eos_ids = end_token_ids(text.tokenizer, folder.config)
    kv_dtype = None if config.kv_cache_dtype == "auto" else getattr(torch, config.kv_cache_dtype)
    options = EngineConfig(eos_token_ids=eos_ids, kv_dtype=kv_dtype, disk_cache=disk, **config.engine)
    check_options(folder.config, options, place_model(folder, config.dtype, config.ranks))
    read = {name: read_adapter(path, folder.config) for name, path in adapters.items()}
    how = EngineOpening(config.dtype, replace(config.ranks, threads=config.threads), progress, note)
    folder.layout = folder.layout or read_layout(folder.path)
    identity = identity_of(folder.layout, text.path)
    model, engine = _open(folder, options, how, read)
    note(engine.memory_plan.describe())
    served = ServedModel(
        text.tokenizer,
        chat_format,
        names=config.names,
        adapters=list(config.adapters),
        vocab_size=folder.config.vocab_size,
        max_model_len=engine.max_model_len,
        eos_ids=eos_ids,
        defaults=defaults,
        tool_style=config.tool_style,
        template_defaults=config.template_defaults,
    )
    served.origin = _origin_of(identity, engine, arithmetic_of(model.device), _settings_of(folder, config))
    if config.marking is not None:
        served.marking = config.marking
    if config.warms_grammars:
        served.warm()
    return engine, served


def _open(
    folder: TextFolder, options: EngineConfig, how: EngineOpening, adapters: Mapping[str, Adapter]
) -> tuple[CausalLM, Engine]:
    from qnext.engine import Engine
    from qnext.lora.serving import serve_adapters

    if not adapters:
        return open_engine(folder, options, how)
    model = load_weights(folder, how.dtype, progress=how.progress)
    return model, Engine.of(model, replace(options, adapters=serve_adapters(model, adapters)))


def _check_on_ranks(config: ServeConfig) -> None:
    """Raises UsageError for what an engine on ranks does not have."""
    if config.adapters:
        raise UsageError("--lora: adapters are not served on ranks; `qnext merge` makes one a part of the model")
    if config.disk_cache is not None:
        raise UsageError("--disk-cache: on ranks prefixes stay in the memory of each rank")


def _origin_of(identity: FolderIdentity, engine: Engine, arithmetic: str, settings: Mapping[str, Any]) -> AnswerOrigin:
    from qnext.server.inference.origin import AnswerOrigin

    adapters = engine.executor.adapters
    return AnswerOrigin(*identity, version=__version__, arithmetic=arithmetic, settings=settings, adapters=adapters)


def _settings_of(folder: TextFolder, config: ServeConfig) -> dict[str, Any]:
    """The options that change answers, where they are not the default."""
    state_dtype = config.engine.get("state_dtype")
    given = {
        "dtype": config.dtype,
        "yarn": folder.yarn,
        "kv_cache_dtype": None if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        "state_dtype": None if state_dtype is None else str(state_dtype).removeprefix("torch."),
        "template_defaults": dict(config.template_defaults or {}),
    }
    return {name: value for name, value in given.items() if value}


def _text_side(folder: TextFolder, adapters: Mapping[str, Path], note: Callable[[str], None]) -> TextFolder:
    """The folder whose tokenizer, chat template and sampling count: where `folder` has no chat template, that of the
    first adapter that was trained with one.

    Warns of adapters whose template is another than the one that chats are written with.
    """
    from qnext.text.template_files import read_templates
    from qnext.text.tokenizer import Tokenizer

    text, templates = folder, read_templates(folder.path)
    for name, path in adapters.items():
        own = read_templates(path)
        if own is None:
            continue
        if templates is None:
            note(f"{folder.path}: no chat template; chats are written as adapter {name} was trained")
            templates = own
            tokenizer = Tokenizer.from_folder(path, num_rows=folder.config.vocab_size)
            text = replace(folder, path=path, tokenizer=tokenizer, layout=None)
        elif own.texts != templates.texts:
            warn(f"adapter {name} was trained with another chat template than chats are written with")
    return text


def named_adapters(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """From NAME=FOLDER, each name once and none of the model's own `names`. Raises UsageError."""
    adapters: dict[str, Path] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or not name or not folder:
            raise UsageError(f"--lora {text}: must be NAME=FOLDER")
        if name in adapters or name in names:
            raise UsageError(f"--lora {text}: the name {name} is taken")
        adapters[name] = Path(folder)
    return adapters


def speculation_of(flag: bool | None, config: str | None) -> dict[str, Any]:
    """The engine options that the flag and vLLM's JSON ask for."""
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
    """The name by which a server calls MODEL: its hub name, `model_name` of its card (README.md), or the folder's
    name."""
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
