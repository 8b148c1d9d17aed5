"""`qnext bench`: speed, loading and memory, beside peers and the limits of the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli._types import Strict

if TYPE_CHECKING:
    from qnext.cli._bench import BenchPlan
    from qnext.config import ModelConfig

_DEFAULT_DEPTHS = (0, 2048, 8192)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model folder")],
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="f32, f16, bf16, or a scheme of `qnext quantize`; may be repeated; else the folder as it is"),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="llama.cpp or transformers, on the same weights; may be repeated")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="of every contestant; else the cores of the machine")] = None,
    prefill: Annotated[int, typer.Option(help="tokens of the prompt")] = 512,
    long_prefill: Annotated[int | None, typer.Option(help="a longer prompt, read once and by qnext alone")] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="tokens before the decoded ones; else 0,2048,8192")
    ] = None,
    decode: Annotated[int, typer.Option(help="tokens that are decoded at each depth")] = 32,
    rounds: Annotated[int, typer.Option(help="how often everybody has a turn, after one to warm up")] = 3,
    llama_cpp: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="programs of llama.cpp; else those on the PATH")
    ] = None,
    gguf: Annotated[
        list[str] | None,
        typer.Option(metavar="[SCHEME=]FILE", help="for llama.cpp; may be repeated; else `qnext convert` makes it"),
    ] = None,
    cache: Annotated[
        Path, typer.Option(metavar="FOLDER", help="keeps the quantised folders and GGUF files that are made")
    ] = Path("runs/bench"),
    date: Annotated[str | None, typer.Option(help="noted in the result as it is")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout instead of a table")] = False,
    strict: Strict = False,
) -> None:
    """Measure prefill, decoding at several depths, loading and memory.

    Contestants run in turn, each in a process of its own, with random tokens. The ratios are what a run can claim;
    the rates belong to this machine at this time. Shares of bandwidth and peak relate a figure to what was measured
    here of memory and arithmetic. `qnext bench serve` puts a load on a running server.
    """
    from qnext.cli._bench import run_bench
    from qnext.cli._bench_table import format_table

    plan = _plan(
        model, schemes=scheme or [], peers=peer or [], threads=threads, prefill=prefill, long_prefill=long_prefill,
        depths=depths, decode_tokens=decode, rounds=rounds, llama_cpp=llama_cpp, ggufs=gguf or [], cache=cache,
        date=date,
    )  # fmt: skip
    document = run_bench(plan, say=lambda text: print(text, file=sys.stderr))
    print(json.dumps(document) if as_json else format_table(document), flush=True)


def _plan(
    model: str,
    *,
    schemes: list[str],
    peers: list[str],
    threads: int | None,
    prefill: int,
    long_prefill: int | None,
    depths: str | None,
    decode_tokens: int,
    rounds: int,
    llama_cpp: Path | None,
    ggufs: list[str],
    cache: Path,
    date: str | None,
) -> BenchPlan:
    """Everything that can be refused is refused here, before any work."""
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.header import read_index
    from qnext.checkpoint.resolve import resolve_model
    from qnext.cli._bench import LLAMA_CPP, TRANSFORMERS, BenchPlan, peers_of
    from qnext.cli._bench_files import BenchFiles
    from qnext.cli._bench_llama import find_tools
    from qnext.errors import UsageError

    folder = resolve_model(model)
    config = read_layout(folder, read_index(folder).tensors).config
    files = BenchFiles(folder, cache)
    schemes = list(dict.fromkeys(schemes)) or [files.stored]
    peers = list(dict.fromkeys(peers))
    _check_names(schemes, peers, stored=files.stored)
    counts = {"--prefill": prefill, "--decode": decode_tokens, "--rounds": rounds, "--threads": threads or 1}
    for option, value in counts.items():
        if value < 1:
            raise UsageError(f"{option} must be at least 1, not {value}")
    plan = BenchPlan(
        files=files, config=config, schemes=schemes, peers=peers, threads=threads or _cores(), prefill=prefill,
        long_prefill=long_prefill, depths=_depths(depths, config, decode_tokens), decode_tokens=decode_tokens,
        rounds=rounds, llama=find_tools(llama_cpp) if LLAMA_CPP in peers else None,
        ggufs=_ggufs(ggufs, schemes), date=date,
    )  # fmt: skip
    for option, length in (("--prefill", prefill), ("--long-prefill", long_prefill)):
        if length is not None and not 1 <= length < config.context_length:
            raise UsageError(f"{option} {length}: a prompt has 1 to {config.context_length - 1} tokens in this context")
    if TRANSFORMERS in peers:
        _require_transformers()
    for name in peers:
        if not any(name in peers_of(plan, scheme) for scheme in schemes):
            hint = "reads float folders; add --scheme bf16" if name == TRANSFORMERS else "needs --gguf for this folder"
            raise UsageError(f"--peer {name}: nothing to compare in {', '.join(schemes)}; it {hint}")
    return plan


def _check_names(schemes: list[str], peers: list[str], *, stored: str) -> None:
    from qnext.cli._bench import PEERS
    from qnext.cli._bench_files import FLOAT_SCHEMES
    from qnext.errors import UsageError
    from qnext.quant.scheme import SCHEMES

    for name in peers:
        if name not in PEERS:
            raise UsageError(f"--peer {name}: must be {' or '.join(PEERS)}")
    for name in schemes:
        if name not in (*FLOAT_SCHEMES, *SCHEMES, stored):
            raise UsageError(f"--scheme {name}: must be one of {', '.join((*FLOAT_SCHEMES, *SCHEMES))}")
        if name != stored and stored not in FLOAT_SCHEMES:
            raise UsageError(f"--scheme {name}: the folder is quantised already; without --scheme it runs as it is")


def _depths(text: str | None, config: ModelConfig, decode_tokens: int) -> list[int]:
    """Depths in rising order; the default ones only as far as the context reaches."""
    from qnext.errors import UsageError

    deepest = config.context_length - decode_tokens - 1
    if text is None:
        return [depth for depth in _DEFAULT_DEPTHS if depth <= deepest]
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--depths {text!r}: must be numbers, such as 0,2048") from None
    for depth in found:
        if not 0 <= depth <= deepest:
            raise UsageError(
                f"--depths: {depth} and {decode_tokens} decoded tokens are beyond the context of "
                f"{config.context_length}; at most {max(deepest, 0)}"
            )
    return found


def _ggufs(texts: list[str], schemes: list[str]) -> dict[str, Path]:
    from qnext.errors import UsageError

    found: dict[str, Path] = {}
    for text in texts:
        scheme, equals, name = text.partition("=")
        if not equals:
            if len(schemes) > 1:
                raise UsageError(f"--gguf {text}: with several schemes say for which, as SCHEME=FILE")
            scheme, name = schemes[0], text
        if scheme not in schemes:
            raise UsageError(f"--gguf {text}: {scheme} is not among the schemes {', '.join(schemes)}")
        if not Path(name).is_file():
            raise UsageError(f"--gguf {name}: no such file")
        found[scheme] = Path(name)
    return found


def _require_transformers() -> None:
    import importlib.util

    from qnext.errors import UsageError

    if importlib.util.find_spec("transformers") is None:
        raise UsageError("peer transformers: not installed; pip install transformers")


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
