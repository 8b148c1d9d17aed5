"""`qnext bench`: speed, loading and memory, beside peers and the limits of the machine."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qnext.cli.flags.sampling import Device, ExpertMemory
from qnext.cli.flags.values import AsJson, Model, Strict, option
from qnext.errors import UsageError
from qnext.session.placement import AUTO

if TYPE_CHECKING:
    from qnext.bench.plan import BenchPlan


@dataclass(frozen=True)
class BenchFlags:
    """What is measured, against whom, and with which files."""

    scheme: Annotated[
        list[str] | None,
        option("f32, f16, bf16, or a scheme of `qnext quantize`; may be repeated; else the folder as it is"),
    ] = None
    peer: Annotated[list[str] | None, option("llama.cpp or transformers, on the same weights; may be repeated")] = None
    threads: Annotated[int | None, option("of every contestant; else the cores of the machine")] = None
    prefill: Annotated[int, option("tokens of the prompt")] = 512
    long_prefill: Annotated[int | None, option("a longer prompt, read once and by qnext alone")] = None
    depths: Annotated[str | None, option("tokens before the decoded ones; else 0,2048,8192", metavar="N,N,...")] = None
    decode: Annotated[int, option("tokens that are decoded at each depth")] = 32
    expert_memory: ExpertMemory = None
    device: Device = AUTO
    rounds: Annotated[int, option("how often everybody has a turn, after one to warm up")] = 3
    llama_cpp: Annotated[Path | None, option("programs of llama.cpp; else those on the PATH", metavar="FOLDER")] = None
    gguf: Annotated[
        list[str] | None,
        option("for llama.cpp; may be repeated; else `qnext convert` makes it", metavar="[SCHEME=]FILE"),
    ] = None
    cache: Annotated[Path, option("keeps the quantised folders and GGUF files that are made", metavar="FOLDER")] = Path(
        "runs/bench"
    )
    date: Annotated[str | None, option("noted in the result as it is")] = None


def command(
    model: Model,
    *,
    flags: BenchFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Measure prefill, decoding at several depths, loading and memory.

    Contestants run in turn, each in a process of its own, with random tokens. The ratios are what a run can claim;
    the rates belong to this machine at this time. Shares of bandwidth and peak relate a figure to what was measured
    here of memory and arithmetic, on a GPU to what is published of it. There no peer runs beside. `qnext bench serve`
    puts a load on a running server.
    """
    from qnext.bench.predicted import noted, predicted_rates
    from qnext.bench.run import run_bench
    from qnext.bench.table import format_table
    from qnext.planning.measured import told_errors

    plan = _plan(model, flags)
    rates = predicted_rates(plan)
    document = run_bench(plan, say=lambda text: print(text, file=sys.stderr))
    figures = noted(plan, document, rates)
    document["predicted"] = [each._asdict() for each in figures]
    print(json.dumps(document) if as_json else format_table(document), flush=True)
    if figures and not as_json:
        print(f"beside the predictions of the calibrated machine: {told_errors(figures)}")


def _plan(model: str, flags: BenchFlags) -> BenchPlan:
    """Everything that can be refused is refused here, before any work."""
    from qnext.bench.device import bench_device
    from qnext.bench.files import BenchFiles
    from qnext.bench.llama import find_tools
    from qnext.bench.plan import LLAMA_CPP, BenchPlan, check_names, default_depths
    from qnext.planning.machine import num_allowed_cores
    from qnext.session.folder import open_model

    folder = open_model(model, expert_memory=flags.expert_memory, device=flags.device)
    layout = folder.layout
    assert layout is not None, "nobody has taken it"
    config, files = layout.config, BenchFiles(layout.index, flags.cache)
    schemes, peers = list(dict.fromkeys(flags.scheme or [files.stored])), list(dict.fromkeys(flags.peer or []))
    check_names(schemes, peers, stored=files.stored)
    plan = BenchPlan(
        files=files,
        config=config,
        schemes=schemes,
        peers=peers,
        threads=flags.threads or num_allowed_cores(),
        prefill=flags.prefill,
        long_prefill=flags.long_prefill,
        depths=default_depths(config, flags.decode) if flags.depths is None else _depths(flags.depths),
        decode_tokens=flags.decode,
        rounds=flags.rounds,
        expert_memory=flags.expert_memory,
        device=bench_device(folder, schemes, peers, stored=files.stored),
        llama=find_tools(flags.llama_cpp) if LLAMA_CPP in peers else None,
        ggufs=_ggufs(flags.gguf or [], schemes),
        date=flags.date,
    )
    plan.check()
    return plan


def _depths(text: str) -> list[int]:
    """Depths in rising order."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--depths {text!r}: must be numbers, such as 0,2048") from None


def _ggufs(texts: list[str], schemes: list[str]) -> dict[str, Path]:
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
