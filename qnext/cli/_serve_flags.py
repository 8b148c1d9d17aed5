"""The flags of `qnext serve`, under the names that users of vLLM and llama-server know, by what they are about."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qnext.cli._types import human_int
from qnext.errors import UsageError, warn

_NETWORK, _ACCESS, _MODEL, _MEMORY = "Network", "Access", "Model", "Memory and batching"
_LIMITS, _LOGS = "Limits", "Logs and metrics"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def _no_reasoning_parser(value: str | None) -> str | None:
    if value is not None:
        warn(f"--reasoning-parser {value}: without effect, the model's chat format decides")
    return value


def _body_bytes(value: int) -> int:
    if value < 1:
        raise UsageError(f"--max-body-bytes must be at least 1, not {value}")
    return value


def _hosts(values: list[str] | None) -> list[str] | None:
    from qnext.server.hosts import AllowedHosts

    AllowedHosts(None, values or ())  # raises UsageError for what is no name
    return values


def _names(values: list[str] | None) -> list[str] | None:
    if not all(value.strip() for value in values or ()):
        raise UsageError("--served-model-name must not be empty")
    return values


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub name.")]
Host = Annotated[str, _option(_NETWORK, "--host", help="Address to listen on.")]
Port = Annotated[int, _option(_NETWORK, "--port", min=0, max=65535, help="Port; 0 takes a free one.")]
Uds = Annotated[str | None, _option(_NETWORK, "--uds", help="A Unix socket instead.")]
SslCertfile = Annotated[str | None, _option(_NETWORK, "--ssl-certfile", help="PEM certificate.")]
SslKeyfile = Annotated[str | None, _option(_NETWORK, "--ssl-keyfile", help="Its private key.")]
Origins = Annotated[
    list[str] | None,
    _option(_NETWORK, "--allowed-origins", "--cors-origins", help="Other origins whose pages may call."),
]
AllowedHosts = Annotated[
    list[str] | None,
    _option(
        _NETWORK,
        "--allowed-hosts",
        callback=_hosts,
        help="Names that the server is asked for, beside localhost: a.org,*.b.org, or *.",
    ),
]
Ui = Annotated[bool, _option(_NETWORK, "--ui/--no-ui", help="Serve the page.")]
ApiKey = Annotated[list[str] | None, _option(_ACCESS, "--api-key", help="A key that clients use.")]
ApiKeyFile = Annotated[Path | None, _option(_ACCESS, "--api-key-file", help="A file with one key a line.")]
Keys = Annotated[Path | None, _option(_ACCESS, "--keys", help="Keys made by `qnext keys`.")]
AdminPort = Annotated[
    int | None,
    _option(_ACCESS, "--admin-port", min=0, max=65535, help="Routes for administrators, on the loopback interface."),
]
AdminApiKey = Annotated[list[str] | None, _option(_ACCESS, "--admin-api-key", help="A key for them.")]
InsecureNoAuth = Annotated[
    bool, _option(_ACCESS, "--insecure-no-auth", help="Serve everybody who reaches the address.")
]
OpenReadiness = Annotated[
    bool, _option(_ACCESS, "--open-readiness", help="/health/ready needs no key, for balancers and kubelets.")
]
ServedModelName = Annotated[
    list[str] | None,
    _option(
        _MODEL,
        "--served-model-name",
        "--alias",
        callback=_names,
        help="What clients call it; the first is answered with.",
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None, _option(_MODEL, "--dtype", help="float32 or bfloat16; default: as stored.")
]
Threads = Annotated[int | None, _option(_MODEL, "--threads", min=1, help="CPU threads.")]
SpeculativeConfig = Annotated[
    str | None,
    _option(_MODEL, "--speculative-config", help='As vLLM: {"method":"qwen3_next_mtp","num_speculative_tokens":2}.'),
]
ToolCallParser = Annotated[
    Literal["auto", "hermes", "json", "qwen", "qwen25", "qwen3_coder", "qwen3_xml", "xml"],
    _option(_MODEL, "--tool-call-parser", help="auto, hermes (JSON) or qwen3_coder (XML)."),
]
AutoToolChoice = Annotated[
    bool,
    _option(
        _MODEL, "--enable-auto-tool-choice", show_default=False, help="Without effect: always on; as vLLM's users type."
    ),
]
ReasoningParser = Annotated[
    str | None,
    _option(
        _MODEL,
        "--reasoning-parser",
        callback=_no_reasoning_parser,
        help="Without effect: the chat format decides. As vLLM's users type.",
    ),
]
GenerationConfig = Annotated[
    Literal["auto", "none"],
    _option(_MODEL, "--generation-config", help="auto: the model's sampling defaults; none: OpenAI's."),
]
TrustRemoteCode = Annotated[
    bool, _option(_MODEL, "--trust-remote-code", help="Refused: no code of a model is ever run.")
]
MaxModelLen = Annotated[
    int | None,
    _option(
        _MEMORY,
        "--max-model-len",
        "--ctx-size",
        "--context",
        parser=human_int,
        metavar="N",
        help="Tokens of a request in all.",
    ),
]
MaxNumSeqs = Annotated[int, _option(_MEMORY, "--max-num-seqs", "--parallel", min=1, help="Answers written at once.")]
MaxNumBatchedTokens = Annotated[
    int | None, _option(_MEMORY, "--max-num-batched-tokens", parser=human_int, metavar="N", help="Tokens of one step.")
]
KvCacheDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "int8"],
    _option(_MEMORY, "--kv-cache-dtype", help="auto, float32, bfloat16 or int8."),
]
PrefixCaching = Annotated[
    bool, _option(_MEMORY, "--enable-prefix-caching/--no-enable-prefix-caching", help="Share common prefixes.")
]
DiskCache = Annotated[Path | None, _option(_MEMORY, "--disk-cache", help="Keep prefixes here, over restarts too.")]
DiskCacheBytes = Annotated[
    int, _option(_MEMORY, "--disk-cache-bytes", parser=human_int, metavar="N", show_default="8G", help="How much.")
]
MaxQueued = Annotated[int, _option(_LIMITS, "--max-queued-requests", min=0, help="Requests that wait; more get 503.")]
MaxQueuedPerKey = Annotated[int, _option(_LIMITS, "--max-queued-per-key", min=0, help="Of one key; more get 429.")]
QueueTimeout = Annotated[float, _option(_LIMITS, "--queue-timeout", min=0.01, help="Seconds until the first step.")]
RequestTimeout = Annotated[float, _option(_LIMITS, "--request-timeout", min=0.01, help="Seconds of a request.")]
ShutdownTimeout = Annotated[
    float, _option(_LIMITS, "--shutdown-timeout", min=0.0, help="Seconds that running requests get after SIGTERM.")
]
WatchdogTimeout = Annotated[
    float, _option(_LIMITS, "--watchdog-timeout", min=0.1, help="Seconds of one step, after which the process ends.")
]
MaxBodyBytes = Annotated[
    int,
    _option(
        _LIMITS,
        "--max-body-bytes",
        parser=human_int,
        callback=_body_bytes,
        metavar="N",
        show_default="8M",
        help="Of a request.",
    ),
]
MaxN = Annotated[int, _option(_LIMITS, "--max-n", min=1, max=128, help="Answers to one request.")]
AuditLog = Annotated[Path | None, _option(_LOGS, "--audit-log", help="A line for each request.")]
AuditChain = Annotated[bool, _option(_LOGS, "--audit-chain", help="Chain its lines by hashes.")]
LogFormat = Annotated[Literal["text", "json"], _option(_LOGS, "--log-format", help="text or json.")]
MetricsCompat = Annotated[
    Literal["vllm"] | None, _option(_LOGS, "--metrics-compat", help="vllm: its names of metrics, too.")
]
