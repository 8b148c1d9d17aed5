"""How fast is the standard CPU model in every scheme, against all peers that are here, and are the targets met?

Runs `qnext bench` once on everything, prints its table, and then the targets beside the figures. llama.cpp takes part
where llama-bench is found, transformers where it is installed. The model is made on first use: released layer shapes,
3.9 B parameters, random weights, 8 GB in runs/standard. Quantised folders and GGUF files go to runs/bench.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import operator
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qnext.bench.table import format_ratio, format_table, name_of

STANDARD = ("80b-a3b", "--layers", "16", "--experts", "64", "--vocab-size", "32768", "--seed", "0")
SCHEMES = ("bf16", "int8", "int4-g32", "int4-g128")


class Target(NamedTuple):
    """A figure of schemes that begin with `scheme`: ratio to a peer, within qnext, or of memory to weights."""

    scheme: str
    figure: str
    over: str
    limit: float
    at_most: bool = False


TARGETS = (
    Target("int4", "decode at 0", "llama.cpp", 2.0),
    Target("int8", "decode at 0", "llama.cpp", 1.7),
    Target("bf16", "decode at 0", "llama.cpp", 1.6),
    Target("int4", "prefill 512", "llama.cpp", 3.5),
    Target("bf16", "prefill 512", "transformers", 1.5),
    Target("", "decode at 8192", "decode at 0", 0.85),
    Target("", "prefill 32768", "prefill 512", 0.5),
    Target("", "peak memory without caches", "weights", 1.15, at_most=True),
)


def standard_model() -> str:
    return str(made_model(Path("runs/standard"), STANDARD))


def made_model(folder: Path, arguments: Sequence[str]) -> Path:
    """The folder, made by `qnext init` with these arguments where it is not there."""
    if not (folder / "config.json").exists():
        preset, *options = arguments
        subprocess.run([sys.executable, "-m", "qnext", "init", preset, str(folder), *options], check=True)
    return folder


def peers(options: argparse.Namespace) -> Iterator[str]:
    """Arguments that name the peers that are here; what is missing is said."""
    where = None if options.llama_cpp is None else str(options.llama_cpp)
    if shutil.which("llama-bench", path=where):
        yield from ("--peer", "llama.cpp")
        if where:
            yield from ("--llama-cpp", where)
    else:
        print("without llama.cpp: no llama-bench here; --llama-cpp names its folder", file=sys.stderr)
    if "bf16" in options.schemes and importlib.util.find_spec("transformers"):
        yield from ("--peer", "transformers")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The document of `qnext bench`."""
    command = [sys.executable, "-m", "qnext", "bench", options.folder or standard_model(), "--json", *peers(options)]
    for scheme in options.schemes:
        command += ["--scheme", scheme]
    for gguf in options.gguf:
        command += ["--gguf", gguf]
    for name in ("threads", "prefill", "long_prefill", "depths", "decode", "rounds", "date"):
        value = getattr(options, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def figures(scheme: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(figure, over what, ratio) of everything that a target may be about."""
    for peer in scheme["peers"]:
        for figure in peer["figures"]:
            yield name_of(figure), peer["peer"], figure["ratio"]
    for figure in scheme["within"]:
        yield name_of(figure), name_of({**figure, "tokens": figure["over"], "depth": figure["over"]}), figure["ratio"]
    memory = scheme["memory"]["peak_without_caches_over_weights"]
    yield "peak memory without caches", "weights", {"median": memory, "min": memory, "max": memory}


def judge(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target for every scheme that it is about, where it was measured."""
    found = []
    for target in TARGETS:
        for scheme in document["schemes"]:
            if not scheme["scheme"].startswith(target.scheme):
                continue
            for figure, over, ratio in figures(scheme):
                if (figure, over) == (target.figure, target.over):
                    meets = operator.le if target.at_most else operator.ge
                    found.append(
                        {
                            "scheme": scheme["scheme"],
                            "figure": figure,
                            "over": over,
                            "ratio": ratio,
                            "target": target.limit,
                            "at_most": target.at_most,
                            "met": meets(ratio["median"], target.limit),
                        }
                    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="model folder; default: the standard CPU model, made if need be")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs; default: those on the PATH")
    parser.add_argument("--gguf", action="append", default=[], help="SCHEME=FILE instead of a file that is made")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--long-prefill", type=int, help="default: 32768 for the standard model")
    parser.add_argument("--depths", help="default: that of `qnext bench`")
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--date", help="noted in the result")
    options = parser.parse_args()
    if options.folder is None and options.long_prefill is None:
        options.long_prefill = 32768
    document = measure(options)
    judged = judge(document)
    print(format_table(document))
    print("\ntargets")
    for row in judged:
        sign, word = ("<=" if row["at_most"] else ">="), ("met" if row["met"] else "MISSED")
        what = f"{row['scheme']}, {row['figure']} over {row['over']}"
        print(f"  {what:<55} {sign} {row['target']:<5} {format_ratio(row['ratio']):<22} {word}")
    print(json.dumps({"benchmark": "inference", "targets": judged, **document}))


if __name__ == "__main__":
    main()
