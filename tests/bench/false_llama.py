"""A program that answers like llama-bench and notes how it was called."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# 50 tokens per second for prompts, 20 at depth 0, half of it deeper.
_PROGRAM = """#!{python}
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(pathlib.Path(__file__).with_name("calls"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
rate = 50.0 if options["-n"] == "0" else 20.0 if options.get("-d", "0") == "0" else 10.0
print(json.dumps([{{"model_type": "qwen3next Q8_0", "model_size": 123, "build_commit": "abc", "avg_ts": rate}}]))
"""


def make_false_bench(folder: Path) -> Path:
    """The program, as llama-bench in `folder`."""
    program = folder / "llama-bench"
    program.write_text(_PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return program


def calls_of(folder: Path) -> list[list[str]]:
    """The arguments of every call so far."""
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
