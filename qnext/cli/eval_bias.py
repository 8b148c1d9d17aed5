"""`qnext eval bias`: pairs of sentences that differ in a group, and what a model expects behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from qnext.cli.flags.examinee import AskedModel, ExamineeFlags, words_of
from qnext.cli.flags.values import AsJson, Strict, option


def command(
    model: AskedModel = None,
    *,
    axes: Annotated[str, option("gender, age, origin, religion, with commas, or all.", metavar="NAMES")] = "all",
    pairs: Annotated[Path | None, option("Pairs of your own instead, JSON lines.", metavar="FILE")] = None,
    examinee: ExamineeFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """How much likelier an ending is behind one group than behind another, all other words being equal.

    Positive numbers lean to the first group. The mean over all endings of an axis is taken away. The interval (95 %) is
    over sentences. What such a probe cannot show is printed below it.
    """
    examinee.check(model)
    from qnext.eval.bias import AXES, made_pairs, probe_bias, read_pairs
    from qnext.text.files import read_user_text

    if pairs is not None:
        prompts = read_pairs(read_user_text(pairs), str(pairs))
    else:
        prompts = made_pairs(list(AXES) if axes == "all" else words_of(axes))
    with examinee.open(model) as opened:
        report = probe_bias(opened, prompts)
    print(json.dumps({"model": model or examinee.url, **report.to_json()}) if as_json else report.table())
