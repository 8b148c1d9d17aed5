"""Options of the benchmarks that time training steps beside a peer."""

from __future__ import annotations

import argparse


def step_options(description: str | None) -> argparse.Namespace:
    """Those of the command line: models, the shape of a batch, threads and rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", default=["nano-5m", "micro-20m"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()
