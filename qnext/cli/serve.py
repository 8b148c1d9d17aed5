"""`qnext serve`: a model behind the APIs of OpenAI and Anthropic, with its page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli import _sampling as options
from qnext.cli._served import TOOL_STYLES, load_served, name_of, speculation_of
from qnext.errors import ModelNotFound, UsageError

if TYPE_CHECKING:
    from qnext.engine import Engine
    from qnext.server.app import Server
    from qnext.server.served import ServedModel

_NETWORK, _ACCESS, _MODEL, _MEMORY = "Network", "Access", "Model", "Memory and batching"
_LIMITS, _LOGS = "Limits", "Logs and metrics"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub name.")],
    host: Annotated[str, _option(_NETWORK, "--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _option(_NETWORK, "--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    uds: Annotated[str | None, _option(_NETWORK, "--uds", help="A Unix socket instead.")] = None,
    ssl_certfile: Annotated[str | None, _option(_NETWORK, "--ssl-certfile", help="PEM certificate.")] = None,
    ssl_keyfile: Annotated[str | None, _option(_NETWORK, "--ssl-keyfile", help="Its private key.")] = None,
    origins: Annotated[
        list[str] | None,
        _option(_NETWORK, "--allowed-origins", "--cors-origins", help="Other origins whose pages may call."),
    ] = None,
    ui: Annotated[bool, _option(_NETWORK, "--ui/--no-ui", help="Serve the page.")] = True,
    api_key: Annotated[list[str] | None, _option(_ACCESS, "--api-key", help="A key that clients use.")] = None,
    api_key_file: Annotated[Path | None, _option(_ACCESS, "--api-key-file", help="A file with one key a line.")] = None,
    keys: Annotated[Path | None, _option(_ACCESS, "--keys", help="Keys made by `qnext keys`.")] = None,
    admin_port: Annotated[
        int | None, _option(_ACCESS, "--admin-port", help="Routes for administrators, on the loopback interface.")
    ] = None,
    admin_api_key: Annotated[list[str] | None, _option(_ACCESS, "--admin-api-key", help="A key for them.")] = None,
    insecure_no_auth: Annotated[
        bool, _option(_ACCESS, "--insecure-no-auth", help="Serve everybody who reaches the address.")
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        _option(_MODEL, "--served-model-name", "--alias", help="What clients call it; the first is answered with."),
    ] = None,
    dtype: Annotated[str | None, _option(_MODEL, "--dtype", help="float32 or bfloat16; default: as stored.")] = None,
    threads: Annotated[int | None, _option(_MODEL, "--threads", min=1, help="CPU threads.")] = None,
    yarn: options.Yarn = None,
    speculation: options.Speculation = None,
    speculative_config: Annotated[
        str | None,
        _option(
            _MODEL, "--speculative-config", help='As vLLM: {"method":"qwen3_next_mtp","num_speculative_tokens":2}.'
        ),
    ] = None,
    tool_call_parser: Annotated[
        str, _option(_MODEL, "--tool-call-parser", help="auto, hermes (JSON) or qwen3_coder (XML).")
    ] = "auto",
    auto_tool_choice: Annotated[
        bool, _option(_MODEL, "--enable-auto-tool-choice", help="Always on; accepted for vLLM's users.")
    ] = True,
    reasoning_parser: Annotated[
        str | None, _option(_MODEL, "--reasoning-parser", help="Chosen by the chat format; accepted for vLLM's users.")
    ] = None,
    generation_config: Annotated[
        str, _option(_MODEL, "--generation-config", help="auto: the model's sampling defaults; none: OpenAI's.")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, _option(_MODEL, "--trust-remote-code", help="Refused: no code of a model is ever run.")
    ] = False,
    max_model_len: Annotated[
        int | None, _option(_MEMORY, "--max-model-len", "--ctx-size", "--context", help="Tokens of a request in all.")
    ] = None,
    max_num_seqs: Annotated[
        int, _option(_MEMORY, "--max-num-seqs", "--parallel", min=1, help="Answers written at once.")
    ] = 16,
    max_num_batched_tokens: Annotated[
        int | None, _option(_MEMORY, "--max-num-batched-tokens", help="Tokens of one step.")
    ] = None,
    kv_cache_dtype: Annotated[
        str, _option(_MEMORY, "--kv-cache-dtype", help="auto, float32, bfloat16 or int8.")
    ] = "auto",
    prefix_caching: Annotated[
        bool, _option(_MEMORY, "--enable-prefix-caching/--no-enable-prefix-caching", help="Share common prefixes.")
    ] = True,
    disk_cache: Annotated[
        Path | None, _option(_MEMORY, "--disk-cache", help="Keep prefixes here, over restarts too.")
    ] = None,
    disk_cache_bytes: Annotated[int, _option(_MEMORY, "--disk-cache-bytes", help="How much of the disk.")] = 8 << 30,
    max_queued: Annotated[
        int, _option(_LIMITS, "--max-queued-requests", min=0, help="Requests that wait; more get 503.")
    ] = 512,
    max_queued_per_key: Annotated[
        int, _option(_LIMITS, "--max-queued-per-key", min=0, help="Of one key; more get 429.")
    ] = 64,
    queue_timeout: Annotated[float, _option(_LIMITS, "--queue-timeout", help="Seconds until the first step.")] = 60.0,
    request_timeout: Annotated[float, _option(_LIMITS, "--request-timeout", help="Seconds of a request.")] = 600.0,
    shutdown_timeout: Annotated[
        float, _option(_LIMITS, "--shutdown-timeout", help="Seconds that running requests get after SIGTERM.")
    ] = 30.0,
    watchdog_timeout: Annotated[
        float, _option(_LIMITS, "--watchdog-timeout", help="Seconds of one step, after which the process ends.")
    ] = 300.0,
    max_body_bytes: Annotated[int, _option(_LIMITS, "--max-body-bytes", max=16 << 20, help="Of a request.")] = 8 << 20,
    max_n: Annotated[int, _option(_LIMITS, "--max-n", min=1, max=128, help="Answers to one request.")] = 16,
    audit_log: Annotated[Path | None, _option(_LOGS, "--audit-log", help="A line for each request.")] = None,
    audit_chain: Annotated[bool, _option(_LOGS, "--audit-chain", help="Chain its lines by hashes.")] = False,
    log_format: Annotated[str, _option(_LOGS, "--log-format", help="text or json.")] = "text",
    metrics_compat: Annotated[
        str | None, _option(_LOGS, "--metrics-compat", help="vllm: its names of metrics, too.")
    ] = None,
) -> None:
    """Serve MODEL: OpenAI's and Anthropic's APIs, metrics, and a page. SIGTERM ends it without losing an answer."""
    from qnext.cli._serving import log_to_stderr, print_ready
    from qnext.server.app import Server
    from qnext.server.audit import AuditLog
    from qnext.server.limits import Limits
    from qnext.server.run import Listen, serve

    _one_of("--log-format", log_format, ("text", "json"))
    _one_of("--metrics-compat", metrics_compat, (None, "vllm"))
    _one_of("--generation-config", generation_config, ("auto", "none"))
    _one_of("--tool-call-parser", tool_call_parser, tuple(TOOL_STYLES))
    _one_of("--kv-cache-dtype", kv_cache_dtype, ("auto", "float32", "bfloat16", "int8"))
    if trust_remote_code:
        raise UsageError("--trust-remote-code: nothing of a model is run as code here, so there is nothing to trust")
    ring = _key_ring(api_key, api_key_file, keys, admin_api_key)
    if ring.is_open and uds is None and host not in _LOOPBACK and not insecure_no_auth:
        raise UsageError(f"{host} can be reached from elsewhere: give --api-key or --keys, or --insecure-no-auth")
    if admin_port is not None and not any("admin" in key.scopes for key in ring.keys):
        raise UsageError("--admin-port needs --admin-api-key, or a key with the scope admin in --keys")
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise UsageError("--ssl-certfile and --ssl-keyfile belong together")
    log_to_stderr(log_format, secrets=[*(api_key or ()), *(admin_api_key or ())])
    limits = Limits(
        max_body_bytes=max_body_bytes, max_n=max_n, max_queued=max_queued, max_queued_per_key=max_queued_per_key,
        queue_seconds=queue_timeout, request_seconds=request_timeout, drain_seconds=shutdown_timeout,
        watchdog_seconds=watchdog_timeout,
    )  # fmt: skip
    use_drafts, num_drafts = speculation_of(speculation, speculative_config)
    from qnext.cli._text_model import open_folder

    folder = open_folder(model, yarn=yarn)

    def load() -> tuple[Engine, ServedModel]:
        return load_served(
            folder, dtype=dtype, threads=threads, names=served_model_name or [name_of(model)],
            tool_style=TOOL_STYLES[tool_call_parser], with_defaults=generation_config == "auto",
            engine_options={
                "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens,
                "max_model_len": max_model_len, "prefix_cache": prefix_caching, "speculation": use_drafts,
                "max_draft_tokens": num_drafts, "max_salt_fraction": 1.0 if ring.is_open else 0.5,
            },
            kv_cache_dtype=kv_cache_dtype, disk_cache=disk_cache, disk_cache_bytes=disk_cache_bytes,
        )  # fmt: skip

    def new_server() -> Server:
        return Server(
            keys=ring, limits=limits, with_page=ui, origins=frozenset(origins or ()),
            audit=None if audit_log is None else AuditLog(audit_log, chain=audit_chain),
            metrics_compat="vllm" if metrics_compat else None,
        )  # fmt: skip

    listen = Listen(
        host=host, port=port, uds=uds, admin_port=admin_port, certificate=ssl_certfile, certificate_key=ssl_keyfile
    )
    code = serve(new_server, load, listen, on_ready=print_ready)
    sys.stderr.flush()
    raise typer.Exit(code)


def _key_ring(plain: list[str] | None, plain_file: Path | None, store: Path | None, admin: list[str] | None) -> Any:
    from qnext.server.keys import KeyRing

    found = list(plain or ())
    if plain_file is not None:
        if not plain_file.is_file():
            raise ModelNotFound(f"{plain_file}: no such file of keys")
        found += [line.strip() for line in plain_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise UsageError(f"{plain_file}: holds no key")
    if any(not key.strip() for key in [*found, *(admin or ())]):
        raise UsageError("--api-key must not be empty")
    return KeyRing(store, plain=found, admin=admin or ())


def _one_of(flag: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{flag} must be one of {', '.join(str(choice) for choice in choices if choice)}")
