"""A sample as it will be trained on: what is learnt stands out."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qnext.cli.terminal.text import printable

if TYPE_CHECKING:
    from qnext.recipes.tuning import TuningData


def show(data: TuningData, count: int) -> None:
    """The first `count` samples of each source, to stdout. What is learnt is green; without colours it stands in
    brackets."""
    console = Console(highlight=False, soft_wrap=True)
    for source, shards in zip(data.manifest.sources, data.sources, strict=True):
        samples = (shard[index] for shard in shards for index in range(len(shard)))
        for number, sample in zip(range(count), samples, strict=False):
            console.rule(f"{source.path}, sample {number + 1} of {source.num_samples}")
            text = Text()
            for is_learned, run in groupby(sample.tolist(), key=lambda token: token >= 0):
                ids = [token if is_learned else ~token for token in run]
                part = printable(data.tokenizer.decode(ids), sys.stdout)
                if is_learned:
                    part = part if console.color_system and not console.no_color else f"⟦{part}⟧"
                text.append(part, "bold green" if is_learned else "dim")
            console.print(text)
    console.print(f"\n{data.description}", markup=False)
