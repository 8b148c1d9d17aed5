"""Findings about a model folder, without loading its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.diagnostics.finding import Finding
from qnext.diagnostics.folder import checkpoint_problems, tokenizer_problems
from qnext.diagnostics.plan import ModelPlan, plan_model, speed_finding, streaming_finding
from qnext.errors import CorruptCheckpoint, NotSupported, QnextError, UsageError

if TYPE_CHECKING:
    from qnext.checkpoint.check import Layout
    from qnext.config import ModelConfig
    from qnext.text.tokenizer import Tokenizer

_SHORT, _MAX_PROBLEMS = 4096, 20


def model_findings(
    folder: Path, *, quick: bool, progress: Callable[[int, int], None] | None = None
) -> Iterator[Finding]:
    """Configuration, memory, checkpoint and text side of a folder. `quick` reads headers and no values.

    A folder that cannot be loaded gives a problem called "checkpoint". `progress` is that of `byte_progress`.
    """
    from qnext.checkpoint.check import read_layout

    try:
        layout = read_layout(folder)
    except NotSupported as error:
        data = {"problems": [str(error)], "num_problems": 1, "quick": quick, "not_supported": True}
        yield Finding("checkpoint", "problem", str(error), "the files may be sound, but this form is not read", data)
        return
    except CorruptCheckpoint as error:
        yield _checkpoint([str(error)], quick=quick)
        return
    yield _configuration(layout)
    plan = _plan_of_records(folder, layout)
    if plan is None or plan.forecast.placement == "resident":
        yield _memory_plan(layout.config, layout.num_bytes)
    else:
        yield streaming_finding(plan)
    if plan is not None and plan.fits:
        yield speed_finding(plan)
    yield _checkpoint(_problems(layout, quick=quick, progress=progress), quick=quick)
    yield from _text(folder)


def _configuration(layout: Layout) -> Finding:
    from qnext.planning import count_active, count_parameters

    config = layout.config
    counts, active = count_parameters(config), count_active(config)
    text = (
        f"{config.num_hidden_layers} layers ({config.num_linear_layers} linear, {config.num_full_layers} full "
        f"attention), {counts.trunk:,} parameters, {active.with_head:,} active"
    )
    if config.num_experts:
        text += f", {config.num_experts} experts of which {config.num_experts_per_tok} are chosen"
    if config.num_nextn_predict_layers:
        text += ", a layer for multi-token prediction"
    forms = sorted({form.describe() for form in layout.packed_forms})
    text += f"; context {config.context_length:,}" + (f"; packed {', '.join(forms)}" if forms else "")
    data = {
        "parameters": counts.trunk,
        "active_parameters": active.with_head,
        "context_length": config.context_length,
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
        "has_mtp": bool(config.num_nextn_predict_layers),
        "packed": forms,
    }
    return Finding("configuration", "ok", text, data=data)


def _memory_plan(config: ModelConfig, stored_bytes: int) -> Finding:
    """An estimate beside `Engine`'s plan: that is made when weights are loaded, and shares what is left then."""
    import torch

    from qnext.planning.machine import format_bytes
    from qnext.planning.plan import estimate

    lengths = (min(_SHORT, config.context_length), config.context_length)
    found = estimate(config, stored_bytes, lengths=lengths, num_threads=torch.get_num_threads())
    data = {
        "weight_bytes": stored_bytes,
        "workspace_bytes": found.workspace_bytes,
        "free_bytes": found.free_bytes,
        "kv_bytes_per_1000_tokens": 1000 * found.kv_bytes_per_token,
        "state_bytes_per_sequence": found.state_bytes,
        "sequences": [{"tokens": length, "fit": count} for length, count in found.fits.items()],
    }
    text = (
        f"weights {format_bytes(stored_bytes)}, KV {format_bytes(1000 * found.kv_bytes_per_token)} per 1,000 tokens, "
        f"state {format_bytes(found.state_bytes)} per sequence, steps {format_bytes(found.workspace_bytes)}; beside "
        "them fit " + ", ".join(f"{count:,} sequences of {length:,} tokens" for length, count in found.fits.items())
    )
    if not found.holds_weights:
        free = format_bytes(found.free_bytes)
        advice = f"only {free} are free: `qnext quantize --scheme int4-g32` makes weights a quarter of bf16"
        return Finding("memory plan", "problem", text, advice, data)
    if not found.fits[config.context_length]:
        advice = f"the whole context does not fit; about {found.longest:,} tokens do"
        return Finding("memory plan", "warning", text, advice, data)
    return Finding("memory plan", "ok", text, data=data)


def _plan_of_records(folder: Path, layout: Layout) -> ModelPlan | None:
    """None where experts cannot be read one by one; the checkpoint's findings say so of records that are damaged."""
    from qnext.session.planned import planned_folder

    model = planned_folder(str(folder), layout)
    try:
        return plan_model(model) if model.files else None
    except UsageError:
        return None


def _problems(layout: Layout, *, quick: bool, progress: Callable[[int, int], None] | None) -> list[str]:
    from qnext.checkpoint.check import structure_problems

    if not quick:
        return list(map(str, checkpoint_problems(layout, progress)))
    return [*structure_problems(layout), *tokenizer_problems(layout)]


def _checkpoint(problems: list[str], *, quick: bool) -> Finding:
    what = "headers and tokenizer" if quick else "every tensor and tokenizer"
    if not problems:
        return Finding("checkpoint", "ok", f"{what} are sound", data={"problems": [], "quick": quick})
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    advice = "download or convert it again; `qnext verify` lists everything"
    data = {"problems": problems[:_MAX_PROBLEMS], "num_problems": len(problems), "quick": quick}
    return Finding("checkpoint", "problem", problems[0] + more, advice, data)


def _text(folder: Path) -> Iterator[Finding]:
    """Tokenizer, chat format, and what generation_config.json asks for."""
    from qnext.session.sampling import resolve_sampling
    from qnext.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(folder)
    except QnextError as error:
        yield Finding("tokenizer", "problem", str(error), "copy tokenizer.json of the original model into the folder")
        return
    yield Finding("tokenizer", "ok", f"{tokenizer.vocab_size:,} tokens", data={"vocab_size": tokenizer.vocab_size})
    yield _chat_format(folder, tokenizer)
    try:
        params = resolve_sampling(folder, {})
    except QnextError as error:
        yield Finding("sampling", "problem", str(error), "mend or remove generation_config.json")
        return
    values = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    text = "greedy" if not params.temperature else ", ".join(f"{name} {value}" for name, value in values.items())
    yield Finding("sampling", "ok", f"by default {text}", data=values)


def _chat_format(folder: Path, tokenizer: Tokenizer) -> Finding:
    """The format, tried on a question: a template may be there and still fail."""
    from qnext.text.chat import ChatFormat
    from qnext.text.messages import Message
    from qnext.text.prompts import ChatPrompt

    try:
        chat_format = ChatFormat.for_folder(folder, tokenizer=tokenizer)
    except UsageError:
        return Finding("chat format", "ok", "none: text is completed as it is", data={"name": None})
    except CorruptCheckpoint as error:
        return _wrong_template(error)
    try:
        ChatPrompt([Message("user", "Hello")]).encode(chat_format, tokenizer)
    except QnextError as error:
        return _wrong_template(error)
    finally:
        chat_format.close()
    name = chat_format.name
    text = "the folder's own template" if name == "jinja" else f"{name}, one of the family's"
    return Finding("chat format", "ok", text, data={"name": name})


def _wrong_template(error: QnextError) -> Finding:
    return Finding("chat format", "problem", str(error), "mend chat_template.jinja, or complete text without it")
