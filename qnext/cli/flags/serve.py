"""The flags of `qnext serve`, under the names that users of vLLM and llama-server know, by what they are about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from qnext.cli.flags import sampling as options
from qnext.cli.flags.values import human_int, panel
from qnext.errors import UsageError, warn
from qnext.session.placement import AUTO
from qnext.session.served import ServeConfig, named_adapters, speculation_of

if TYPE_CHECKING:
    from qnext.config import ModelConfig
    from qnext.server.expert_watch import ExpertWatch
    from qnext.server.inference.served import Marking
    from qnext.server.limits import Limits

_network, _access, _model = panel("Network"), panel("Access"), panel("Model")
_memory, _limit, _log = panel("Memory and batching"), panel("Limits"), panel("Logs and metrics")

# Names of ours and of other servers for the two ways in which models write tool calls; None is the chat format's own.
_JSON, _XML = ("hermes", "json", "qwen25", "qwen"), ("qwen3_coder", "qwen3_xml", "xml")
TOOL_STYLES = {"auto": None, **dict.fromkeys(_JSON, "json"), **dict.fromkeys(_XML, "xml")}


def _no_reasoning_parser(value: str | None) -> str | None:
    if value is not None:
        warn(f"--reasoning-parser {value}: without effect, the model's chat format decides")
    return value


def _body_bytes(value: int) -> int:
    if value < 1:
        raise UsageError(f"--max-body-bytes must be at least 1, not {value}")
    return value


def _hosts(values: list[str] | None) -> list[str] | None:
    from qnext.server.access.hosts import AllowedHosts

    AllowedHosts(None, values or ())  # raises UsageError for what is no name
    return values


def _names(values: list[str] | None) -> list[str] | None:
    if not all(value.strip() for value in values or ()):
        raise UsageError("--served-model-name must not be empty")
    return values


@dataclass(frozen=True)
class NetworkFlags:
    """Where it listens, and for whom."""

    host: Annotated[str, _network("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, _network("Port; 0 takes a free one.", min=0, max=65535)] = 8000
    uds: Annotated[str | None, _network("A Unix socket instead.")] = None
    ssl_certfile: Annotated[str | None, _network("PEM certificate.")] = None
    ssl_keyfile: Annotated[str | None, _network("Its private key.")] = None
    origins: Annotated[
        list[str] | None, _network("Other origins whose pages may call.", "--allowed-origins", "--cors-origins")
    ] = None
    allowed_hosts: Annotated[
        list[str] | None,
        _network("Names that the server is asked for, beside localhost: a.org,*.b.org, or *.", callback=_hosts),
    ] = None
    ui: Annotated[bool, _network("Serve the page.")] = True


@dataclass(frozen=True)
class AccessFlags:
    """Who may call."""

    api_key: Annotated[list[str] | None, _access("A key that clients use.")] = None
    api_key_file: Annotated[Path | None, _access("A file with one key a line.")] = None
    keys: Annotated[Path | None, _access("Keys made by `qnext keys`.")] = None
    admin_port: Annotated[
        int | None, _access("Routes for administrators, on the loopback interface.", min=0, max=65535)
    ] = None
    admin_api_key: Annotated[list[str] | None, _access("A key for them.")] = None
    insecure_no_auth: Annotated[bool, _access("Serve everybody who reaches the address.", "--insecure-no-auth")] = False
    open_readiness: Annotated[
        bool, _access("/health/ready needs no key, for balancers and kubelets.", "--open-readiness")
    ] = False


@dataclass(frozen=True)
class ServedFlags:
    """What is served, and how it answers."""

    served_model_name: Annotated[
        list[str] | None,
        _model("What clients call it; the first is answered with.", "--served-model-name", "--alias", callback=_names),
    ] = None
    lora: Annotated[
        list[str] | None,
        _model("NAME=FOLDER: an adapter, for requests that name it as their model.", "--lora", "--lora-modules"),
    ] = None
    dtype: Annotated[Literal["float32", "bfloat16"] | None, _model("float32 or bfloat16; default: as stored.")] = None
    device: options.Device = AUTO
    threads: Annotated[int | None, _model("CPU threads.", min=1)] = None
    yarn: options.Yarn = None
    expert_memory: options.ExpertMemory = None
    speculation: options.Speculation = None
    speculative_config: Annotated[
        str | None, _model('As vLLM: {"method":"qwen3_next_mtp","num_speculative_tokens":2}.')
    ] = None
    tool_call_parser: Annotated[
        Literal["auto", "hermes", "json", "qwen", "qwen25", "qwen3_coder", "qwen3_xml", "xml"],
        _model("auto, hermes (JSON) or qwen3_coder (XML)."),
    ] = "auto"
    auto_tool_choice: Annotated[
        bool,
        _model("Without effect: always on; as vLLM's users type.", "--enable-auto-tool-choice", show_default=False),
    ] = True
    reasoning_parser: Annotated[
        str | None,
        _model("Without effect: the chat format decides. As vLLM's users type.", callback=_no_reasoning_parser),
    ] = None
    generation_config: Annotated[
        Literal["auto", "none"], _model("auto: the model's sampling defaults; none: OpenAI's.")
    ] = "auto"
    chat_template_kwargs: options.TemplateDefaults = None
    watermark: Annotated[
        Path | None, _model("A key of `qnext watermark create`: answers are marked by it.", metavar="KEYFILE")
    ] = None
    watermark_optional: Annotated[
        bool, _model("Mark those answers alone whose requests ask for it.", "--watermark-optional")
    ] = False
    trust_remote_code: Annotated[bool, _model("Refused: no code of a model is ever run.", "--trust-remote-code")] = (
        False
    )


@dataclass(frozen=True)
class MemoryFlags:
    """Sizes of the engine and what it keeps."""

    max_model_len: Annotated[
        int | None,
        _memory(
            "Tokens of a request in all.", "--max-model-len", "--ctx-size", "--context", parser=human_int, metavar="N"
        ),
    ] = None
    max_num_seqs: Annotated[int, _memory("Answers written at once.", "--max-num-seqs", "--parallel", min=1)] = 16
    max_num_batched_tokens: Annotated[int | None, _memory("Tokens of one step.", parser=human_int, metavar="N")] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"], _memory("auto, float32, bfloat16 or int8.")
    ] = "auto"
    prefix_caching: Annotated[
        bool, _memory("Share common prefixes.", "--enable-prefix-caching/--no-enable-prefix-caching")
    ] = True
    disk_cache: Annotated[Path | None, _memory("Keep prefixes here, over restarts too.")] = None
    disk_cache_bytes: Annotated[int, _memory("How much.", parser=human_int, metavar="N", show_default="8G")] = 8 << 30


@dataclass(frozen=True)
class LimitFlags:
    """What requests may take."""

    max_queued: Annotated[int, _limit("Requests that wait; more get 503.", "--max-queued-requests", min=0)] = 512
    max_queued_per_key: Annotated[int, _limit("Of one key; more get 429.", min=0)] = 64
    queue_timeout: Annotated[float, _limit("Seconds until the first step.", min=0.01)] = 60.0
    request_timeout: Annotated[float, _limit("Seconds of a request.", min=0.01)] = 600.0
    shutdown_timeout: Annotated[float, _limit("Seconds that running requests get after SIGTERM.", min=0.0)] = 30.0
    watchdog_timeout: Annotated[float, _limit("Seconds of one step, after which the process ends.", min=0.1)] = 300.0
    max_body_bytes: Annotated[
        int, _limit("Of a request.", parser=human_int, callback=_body_bytes, metavar="N", show_default="8M")
    ] = 8 << 20
    max_n: Annotated[int, _limit("Answers to one request.", min=1, max=128)] = 16

    def limits(self) -> Limits:
        """The same, as the server has them."""
        from qnext.server.limits import Limits

        return Limits(
            max_body_bytes=self.max_body_bytes,
            max_n=self.max_n,
            max_queued=self.max_queued,
            max_queued_per_key=self.max_queued_per_key,
            queue_seconds=self.queue_timeout,
            request_seconds=self.request_timeout,
            drain_seconds=self.shutdown_timeout,
            watchdog_seconds=self.watchdog_timeout,
        )


@dataclass(frozen=True)
class LogFlags:
    """What is written down."""

    audit_log: Annotated[Path | None, _log("A line for each request.")] = None
    audit_chain: Annotated[bool, _log("Chain its lines by hashes.", "--audit-chain")] = False
    log_format: Annotated[Literal["text", "json"], _log("text or json.")] = "text"
    metrics_compat: Annotated[Literal["vllm"] | None, _log("vllm: its names of metrics, too.")] = None
    expert_alert: Annotated[
        str | None, _log("skew=8,dead=0.2,collapse=0.1,drift=0.1: when a layer's experts are an alert.", metavar="...")
    ] = None
    expert_baseline: Annotated[
        Path | None, _log("For drift and collapse: a file of `qnext experts --save-baseline`.", metavar="FILE")
    ] = None

    def expert_watch(self, config: ModelConfig) -> ExpertWatch | None:
        """The watch over the experts of a model, where one is wanted. Raises UsageError."""
        if self.expert_alert is None and self.expert_baseline is None:
            return None
        from qnext.planning.expert_alerts import ExpertThresholds
        from qnext.planning.expert_baseline import ExpertBaseline
        from qnext.server.expert_watch import ExpertWatch, ExpertWatchConfig

        if not config.num_experts:
            raise UsageError("--expert-alert, --expert-baseline: the model has no experts")
        thresholds = ExpertThresholds() if self.expert_alert is None else ExpertThresholds.parse(self.expert_alert)
        baseline = None
        if self.expert_baseline is not None:
            baseline = ExpertBaseline.read(self.expert_baseline)
            layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
            baseline.check(layers, config.num_experts, where=str(self.expert_baseline))
        elif thresholds.needs_reference:
            raise UsageError("--expert-alert drift: there is nothing to drift from without --expert-baseline FILE")
        return ExpertWatch(ExpertWatchConfig(thresholds, baseline, config.num_experts_per_tok))


def serve_config(names: list[str], served: ServedFlags, memory: MemoryFlags) -> ServeConfig:
    """What the flags say of the model and its engine."""
    engine = speculation_of(served.speculation, served.speculative_config) | {
        "max_num_seqs": memory.max_num_seqs,
        "max_num_batched_tokens": memory.max_num_batched_tokens,
        "max_model_len": memory.max_model_len,
        "prefix_cache": memory.prefix_caching,
    }
    return ServeConfig(
        names,
        engine,
        adapters=named_adapters(served.lora or (), names),
        dtype=served.dtype,
        threads=served.threads,
        tool_style=TOOL_STYLES[served.tool_call_parser],
        kv_cache_dtype=memory.kv_cache_dtype,
        template_defaults=served.chat_template_kwargs,
        with_defaults=served.generation_config == "auto",
        disk_cache=memory.disk_cache,
        disk_cache_bytes=memory.disk_cache_bytes,
        warms_grammars=True,
        marking=_marking(served),
    )


def _marking(served: ServedFlags) -> Marking:
    from qnext.server.inference.served import Marking
    from qnext.session.watermark import read_key

    if served.watermark is None and served.watermark_optional:
        raise UsageError("--watermark-optional needs --watermark KEYFILE")
    return Marking(None if served.watermark is None else read_key(served.watermark), served.watermark_optional)
