"""qnext quantize: a model folder in four or eight bits."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.values import AsRecords, Strict, option
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.quant.report import QualityReport

_METHODS = ("gptq", "nearest")


@dataclass(frozen=True)
class SampleFlags:
    """A text, and what it is for."""

    text: Annotated[
        Path | None, option("UTF-8 text to calibrate and measure on; without, round nearest", metavar="FILE")
    ] = None
    method: Annotated[str, option("with --text: gptq, or nearest to measure only")] = "gptq"
    tokens: Annotated[int, option("of the text, at most; spread over all of it", min=64)] = 131072


@dataclass(frozen=True)
class ShardFlags:
    """A source that the disk need not hold as a whole."""

    delete_source_shards: Annotated[
        bool, option("delete each shard of MODEL when all of it is safely written", "--delete-source-shards")
    ] = False
    from_hub: Annotated[bool, option("MODEL is a hub name; its shards are downloaded one at a time", "--from-hub")] = (
        False
    )
    revision: Annotated[str | None, option("with --from-hub: branch, tag or commit")] = None


@dataclass(frozen=True)
class ToldFlags:
    """What is told of the result."""

    report: Annotated[Path | None, option("write the quality report there, as JSON", metavar="FILE")] = None
    watts: Annotated[
        float | None, option("what the machine draws meanwhile; the provenance of OUT then tells the energy", min=0)
    ] = None


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model folder: bf16, fp16, fp32 or official FP8")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make; must be new or empty")],
    scheme: Annotated[str, typer.Option(help="int4-g32|int4-g64|int4-g128|int8|int8-g32|int8-g64|int8-g128")],
    head: Annotated[
        str | None, typer.Option(metavar="keep|int8|int4", help="the output matrix [default: int8; keep where tied]")
    ] = None,
    *,
    sample: SampleFlags,
    shards: ShardFlags,
    told: ToldFlags,
    records: AsRecords = False,
    as_json: Annotated[bool, typer.Option("--json", help="the quality report on stdout, as JSON")] = False,
    strict: Strict = False,
) -> None:
    """Quantise a model and report what it cost.

    The layout is compressed-tensors' pack-quantized. Layers are read, rounded and written one at a time. With --text
    four fifths of its sequences calibrate GPTQ; KL, perplexity and the routers' choices are measured on the rest.

    With --delete-source-shards or --from-hub the disk holds one shard of the original beside what is done. What ends
    such a run leaves OUT.unfinished, and the same command goes on from there.
    """
    from qnext.files import write_file
    from qnext.quant.scheme import find_scheme

    if sample.method not in _METHODS:
        raise UsageError(f"--method {sample.method}: must be {' or '.join(_METHODS)}")
    find_scheme(scheme)
    if told.report is not None and told.report.exists():
        raise UsageError(f"{told.report}: exists already")
    if shards.revision is not None and not shards.from_hub:
        raise UsageError("--revision goes with --from-hub alone")
    if not shards.delete_source_shards and not shards.from_hub:
        result = _at_once(model, out, scheme, head, sample, records, told.watts)
    elif records:
        raise UsageError("--records needs the whole model; `qnext convert OUT OTHER --records` makes them afterwards")
    elif sample.text is not None:
        raise UsageError("--text needs the whole model: neither --delete-source-shards nor --from-hub goes with it")
    else:
        result = _shard_by_shard(model, out, scheme, head, shards, told.watts)
    document = json.dumps(result.to_json(), indent=2)
    print(document if as_json else result.table(), file=sys.stdout if as_json else sys.stderr)
    if told.report is not None:
        write_file(told.report, document + "\n")
    if not as_json:
        print(out)


def _at_once(
    model: str,
    out: Path,
    scheme: str,
    head: str | None,
    flags: SampleFlags,
    records: bool,
    watts: float | None,
) -> QualityReport:
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.provenance import Making, data_of
    from qnext.checkpoint.quantize import quantize_folder
    from qnext.checkpoint.resolve import resolve_model
    from qnext.checkpoint.text_sample import sample_of_text
    from qnext.cli.terminal.progress import byte_progress
    from qnext.quant.scheme import make_policy

    path = resolve_model(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty")
    source = read_layout(path)
    policy = make_policy(scheme, head=head, is_tied=source.config.tie_word_embeddings)
    sample = None if flags.text is None else sample_of_text(flags.text, path, source.config, flags.tokens)
    is_calibrated = flags.method == "gptq"
    with byte_progress("quantising") as progress:
        return quantize_folder(
            source,
            out,
            policy=policy,
            sample=sample,
            is_calibrated=is_calibrated,
            with_records=records,
            progress=progress,
            making=Making("quantize", data=[] if flags.text is None else data_of([flags.text]), watts=watts),
        )


def _shard_by_shard(
    model: str, out: Path, scheme: str, head: str | None, flags: ShardFlags, watts: float | None
) -> QualityReport:
    from qnext.checkpoint.hub_shards import HubShards
    from qnext.checkpoint.provenance import Making
    from qnext.checkpoint.quantize_in_runs import quantize_in_runs
    from qnext.checkpoint.resolve import resolve_folder
    from qnext.checkpoint.shard_source import LocalShards
    from qnext.cli.terminal.progress import byte_progress

    source = HubShards(model, flags.revision) if flags.from_hub else LocalShards(resolve_folder(model))
    with byte_progress("quantising") as progress:
        making = Making("quantize", watts=watts)
        return quantize_in_runs(source, out, scheme=scheme, head=head, progress=progress, making=making)
