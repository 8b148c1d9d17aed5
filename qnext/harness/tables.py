"""The announcement's tables: what was published, with which settings, and what of it lm-evaluation-harness can run.

Published figures are those of the model cards (huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct and -Thinking, September
2025). The announcement gives those of the base model as a picture, from which none was read. Shots of the base model
are those of section 3.3 of the Qwen3 report (arXiv:2505.09388); sampling and lengths of answers are the cards'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qnext.errors import UsageError, did_you_mean

_INSTRUCT = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0, "max_gen_toks": 16384}
_THINKING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "max_gen_toks": 32768}
_HARD = {**_THINKING, "max_gen_toks": 81920}  # mathematics and programming contests
TABLES = ("base", "instruct", "thinking")


@dataclass(frozen=True)
class PublishedRow:
    """A benchmark of a table. `tasks` are the harness's, by name or pattern, whose values of `metric` are averaged.

    There are none where the harness has no such task, and `instead` says what to run. `note` tells where the harness's
    task differs from the published one.
    """

    key: str
    name: str
    published: float | None
    tasks: tuple[str, ...] = ()
    metric: str = ""
    num_fewshot: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    is_chat: bool = False
    runs_code: bool = False
    note: str = ""
    instead: str = ""


_HUMANEVAL = "https://github.com/evalplus/evalplus: evalplus.evaluate --base-url of `qnext serve`"
_LIVECODE = "https://github.com/LiveCodeBench/LiveCodeBench with the base URL of `qnext serve`"
_ARENA = "https://github.com/lmarena/arena-hard-auto with the base URL of `qnext serve`; a judge model is needed"
_LIVEBENCH = "https://github.com/LiveBench/LiveBench: run_livebench.py --api-base of `qnext serve`"
_OWN_PROMPT = "the harness's prompt, not the publisher's"
_RULER_NOTE = "at 4K; --metadata '{\"max_seq_lengths\": [32768]}' asks others (the card: 98.7 at 32K, 93.5 at 256K)"

_BASE = (
    PublishedRow("mmlu", "MMLU, 5-shot", None, ("mmlu",), "acc,none", 5),
    PublishedRow("mmlu_pro", "MMLU-Pro, 5-shot CoT", None, ("mmlu_pro",), "exact_match,custom-extract", 5),
    PublishedRow(
        "gpqa",
        "GPQA, 5-shot CoT",
        None,
        ("gpqa_main_cot_n_shot",),
        "exact_match,flexible-extract",
        5,
        note="gated data",
    ),
    PublishedRow(
        "gsm8k", "GSM8K, 4-shot CoT", None, ("gsm8k_cot",), "exact_match,flexible-extract", 4, {"max_gen_toks": 512}
    ),
    PublishedRow("math", "MATH, 4-shot CoT", None, ("minerva_math",), "math_verify", 4),
    PublishedRow(
        "evalplus",
        "EvalPlus, 0-shot: mean of HumanEval, MBPP and both with more tests",
        None,
        ("humaneval", "mbpp", "humaneval_plus", "mbpp_plus"),
        "pass@1|pass_at_1",
        runs_code=True,
        note="MBPP is 3-shot in the harness",
        instead=_HUMANEVAL,
    ),
    PublishedRow(
        "crux_o",
        "CRUX-O, 1-shot",
        None,
        ("cruxeval_output_cot",),
        "pass@1",
        1,
        runs_code=True,
        note="the harness writes its one example into the prompt",
    ),
    PublishedRow(
        "mgsm",
        "MGSM, 8-shot CoT",
        None,
        ("mgsm_cot_native",),
        "exact_match,get-answer",
        8,
        note="no more examples than the data have",
    ),
    PublishedRow("include", "INCLUDE, 5-shot", None, ("include_base_44_*_few_shot_og",), "acc,none", 5),
)


def _chat(
    key: str,
    name: str,
    published: float | None,
    tasks: tuple[str, ...],
    metric: str,
    sampling: Mapping[str, Any],
    note: str = _OWN_PROMPT,
) -> PublishedRow:
    return PublishedRow(key, name, published, tasks, metric, 0, sampling, True, note=note)


_INCLUDE = PublishedRow(
    "include",
    "INCLUDE",
    78.9,
    ("include_base_44_*_few_shot_og",),
    "acc,none",
    5,
    note="by log-likelihood, 5-shot: the card names no settings",
)
_INSTRUCT_ROWS = (
    _chat("mmlu_pro", "MMLU-Pro", 80.6, ("mmlu_pro",), "exact_match,custom-extract", _INSTRUCT),
    _chat(
        "gpqa",
        "GPQA Diamond",
        72.9,
        ("gpqa_diamond_cot_zeroshot",),
        "exact_match,flexible-extract",
        _INSTRUCT,
        "gated data; the harness's prompt, sampled once",
    ),
    _chat(
        "aime25", "AIME25", 69.5, ("aime25",), "exact_match,none", _INSTRUCT, "sampled once: repeat with other seeds"
    ),
    _chat("ifeval", "IFEval", 87.6, ("ifeval",), "prompt_level_strict_acc,none", _INSTRUCT, ""),
    _INCLUDE,
    PublishedRow("livecodebench", "LiveCodeBench v6", 56.6, instead=_LIVECODE),
    PublishedRow("arena_hard", "Arena-Hard v2", 82.7, instead=_ARENA),
    PublishedRow("livebench", "LiveBench 20241125", 75.8, instead=_LIVEBENCH),
    _chat("ruler", "RULER, 4K", 98.5, ("ruler",), "4096,none", {"max_gen_toks": 128}, _RULER_NOTE),
)
_THINKING_ROWS = (
    _chat("mmlu_pro", "MMLU-Pro", 82.7, ("mmlu_pro",), "exact_match,custom-extract", _THINKING),
    _chat(
        "gpqa",
        "GPQA Diamond",
        77.2,
        ("gpqa_diamond_cot_zeroshot",),
        "exact_match,flexible-extract",
        _THINKING,
        "gated data; the harness's prompt, sampled once",
    ),
    _chat("aime25", "AIME25", 87.8, ("aime25",), "exact_match,none", _HARD, "sampled once: repeat with other seeds"),
    _chat("ifeval", "IFEval", 88.9, ("ifeval",), "prompt_level_strict_acc,none", _THINKING, ""),
    _INCLUDE,
    PublishedRow("livecodebench", "LiveCodeBench v6", 68.7, instead=_LIVECODE),
    PublishedRow("arena_hard", "Arena-Hard v2", 62.3, instead=_ARENA),
    PublishedRow("livebench", "LiveBench 20241125", 76.6, instead=_LIVEBENCH),
)
_ROWS = {"base": _BASE, "instruct": _INSTRUCT_ROWS, "thinking": _THINKING_ROWS}


def rows_of(table: str, only: str | None = None) -> tuple[PublishedRow, ...]:
    """The rows of a table, or one of them. Raises UsageError for names that there are not."""
    if table not in _ROWS:
        raise UsageError(f"--table {table}: must be one of {', '.join(TABLES)}")
    rows = _ROWS[table]
    if only is None:
        return rows
    keys = [row.key for row in rows]
    if only not in keys:
        raise UsageError(f"--only {only}: the table {table} has {', '.join(keys)}{did_you_mean(only, keys)}")
    return tuple(row for row in rows if row.key == only)
