"""`qnext serve`: a model behind the APIs of OpenAI and Anthropic, with its page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.cli import _sampling as options
from qnext.cli import _serve_flags as flags
from qnext.cli._served import TOOL_STYLES, load_served, name_of, speculation_of
from qnext.cli._text_model import open_folder
from qnext.cli._types import Strict
from qnext.errors import ModelNotFound, UsageError

if TYPE_CHECKING:
    from qnext.server.keys import KeyRing
    from qnext.server.run import Listen

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def command(
    model: flags.Model,
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 8000,
    uds: flags.Uds = None,
    ssl_certfile: flags.SslCertfile = None,
    ssl_keyfile: flags.SslKeyfile = None,
    origins: flags.Origins = None,
    allowed_hosts: flags.AllowedHosts = None,
    ui: flags.Ui = True,
    api_key: flags.ApiKey = None,
    api_key_file: flags.ApiKeyFile = None,
    keys: flags.Keys = None,
    admin_port: flags.AdminPort = None,
    admin_api_key: flags.AdminApiKey = None,
    insecure_no_auth: flags.InsecureNoAuth = False,
    open_readiness: flags.OpenReadiness = False,
    served_model_name: flags.ServedModelName = None,
    dtype: flags.Dtype = None,
    threads: flags.Threads = None,
    yarn: options.Yarn = None,
    speculation: options.Speculation = None,
    speculative_config: flags.SpeculativeConfig = None,
    tool_call_parser: flags.ToolCallParser = "auto",
    auto_tool_choice: flags.AutoToolChoice = True,
    reasoning_parser: flags.ReasoningParser = None,
    generation_config: flags.GenerationConfig = "auto",
    chat_template_kwargs: options.TemplateDefaults = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = 16,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = None,
    kv_cache_dtype: flags.KvCacheDtype = "auto",
    prefix_caching: flags.PrefixCaching = True,
    disk_cache: flags.DiskCache = None,
    disk_cache_bytes: flags.DiskCacheBytes = 8 << 30,
    max_queued: flags.MaxQueued = 512,
    max_queued_per_key: flags.MaxQueuedPerKey = 64,
    queue_timeout: flags.QueueTimeout = 60.0,
    request_timeout: flags.RequestTimeout = 600.0,
    shutdown_timeout: flags.ShutdownTimeout = 30.0,
    watchdog_timeout: flags.WatchdogTimeout = 300.0,
    max_body_bytes: flags.MaxBodyBytes = 8 << 20,
    max_n: flags.MaxN = 16,
    audit_log: flags.AuditLog = None,
    audit_chain: flags.AuditChain = False,
    log_format: flags.LogFormat = "text",
    metrics_compat: flags.MetricsCompat = None,
    strict: Strict = False,
) -> None:
    """Serve MODEL: OpenAI's and Anthropic's APIs, metrics, and a page. SIGTERM ends it without losing an answer."""
    from qnext.cli._serving import Face, log_to_stderr, new_server, print_ready
    from qnext.server.limits import Limits
    from qnext.server.run import Listen, serve

    listen = Listen(host, port, uds, admin_port, ssl_certfile, ssl_keyfile)
    ring = _checked(_key_ring(api_key, api_key_file, keys, admin_api_key), listen, insecure_no_auth, trust_remote_code)
    log_to_stderr(log_format, secrets=[*(api_key or ()), *(admin_api_key or ())])
    limits = Limits(
        max_body_bytes=max_body_bytes, max_n=max_n, max_queued=max_queued, max_queued_per_key=max_queued_per_key,
        queue_seconds=queue_timeout, request_seconds=request_timeout, drain_seconds=shutdown_timeout,
        watchdog_seconds=watchdog_timeout,
    )  # fmt: skip
    engine = speculation_of(speculation, speculative_config) | {
        "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "max_model_len": max_model_len,
        "prefix_cache": prefix_caching,
    }  # fmt: skip
    load = partial(
        load_served, open_folder(model, yarn=yarn), names=served_model_name or [name_of(model)], engine_options=engine,
        dtype=dtype, threads=threads, tool_style=TOOL_STYLES[tool_call_parser], kv_cache_dtype=kv_cache_dtype,
        template_defaults=chat_template_kwargs, with_defaults=generation_config == "auto", disk_cache=disk_cache,
        disk_cache_bytes=disk_cache_bytes, warms_grammars=True,
    )  # fmt: skip
    face = Face(ui, open_readiness, origins or (), allowed_hosts or (), metrics_compat)
    serve(partial(new_server, ring, limits, face, audit_log, audit_chain), load, listen, on_ready=print_ready)


def _key_ring(plain: list[str] | None, plain_file: Path | None, store: Path | None, admin: list[str] | None) -> KeyRing:
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


def _checked(ring: KeyRing, listen: Listen, is_insecure: bool, trusts_code: bool) -> KeyRing:
    """The ring. Raises UsageError for an address that anybody could use, a listener that nobody could, and for trust
    in code."""
    if trusts_code:
        raise UsageError("--trust-remote-code: nothing of a model is run as code here, so there is nothing to trust")
    if (listen.certificate is None) != (listen.certificate_key is None):
        raise UsageError("--ssl-certfile and --ssl-keyfile belong together")
    if listen.certificate is not None:
        _check_certificate(listen.certificate, listen.certificate_key)
    if ring.is_open and listen.uds is None and listen.host not in _LOOPBACK and not is_insecure:
        raise UsageError(
            f"{listen.host} can be reached from elsewhere: give --api-key or --keys, or --insecure-no-auth"
        )
    if listen.admin_port is not None and not any("admin" in key.scopes for key in ring.keys):
        raise UsageError("--admin-port needs --admin-api-key, or a key with the scope admin in --keys")
    return ring


def _check_certificate(certificate: str, key: str | None) -> None:
    """Raises UsageError where the files are not there or are no pair."""
    import ssl

    for option, name in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        if name is not None and not Path(name).is_file():
            raise UsageError(f"{option} {name}: no such file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise UsageError(
            f"--ssl-certfile {certificate}: no certificate that fits --ssl-keyfile {key} ({error})"
        ) from None
