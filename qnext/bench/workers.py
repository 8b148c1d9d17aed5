"""The workers of `bench`, in processes of their own: qnext, transformers, and the limits of the machine.

A worker answers step(kind, ...): "prefill" and "decode" with seconds, "facts" with what it found out by itself.
"""

from __future__ import annotations

import importlib
import math
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from qnext.bench.contest import Step
from qnext.errors import DoesNotFit, UsageError
from qnext.planning.machine import peak_bytes

if TYPE_CHECKING:
    import torch

    from qnext.model import CausalLM


def limits_worker(*, threads: int) -> Step:
    """One step without arguments: bandwidth, peak arithmetic, and the instruction set of the native kernels."""
    from qnext import ops
    from qnext.ops.limits import peak_arithmetic, read_bandwidth

    ops.set_num_threads(threads)

    def step() -> dict[str, Any]:
        return {
            "read_bytes_per_second": read_bandwidth(),
            "operations_per_second": peak_arithmetic(),
            "native_kernels": ops.instruction_set(),
        }

    return step


def qnext_worker(
    *,
    folder: str,
    dtype: str | None,
    threads: int,
    decode_tokens: int,
    expert_memory: int | None = None,
    device: str = "cpu",
) -> Step:
    """A folder loaded in `dtype`, or as stored; also answers "generate" and "reading" (see SpeedMeter). Bytes are those
    of `device`, and of a GPU's host beside them."""
    import torch

    from qnext import ops
    from qnext.bench.speed import SpeedMeter
    from qnext.engine.memory import peak_bytes_on

    ops.set_num_threads(threads)
    place = torch.device(device)
    before = peak_bytes_on(place)
    start = time.perf_counter()
    if place.type == "cpu":
        model = _load_here(folder, dtype, expert_memory)
    else:
        from qnext.session.folder import load_weights, open_model

        model = load_weights(open_model(folder, expert_memory=expert_memory, device=device), dtype)
    meter = SpeedMeter(model, decode_tokens=decode_tokens)
    meter.prefill_seconds(1)
    loaded = {"load_seconds": time.perf_counter() - start, "peak_bytes_before": before}
    loaded["peak_bytes_loaded"] = peak_bytes_on(place)

    def facts() -> dict[str, Any]:
        parts = _bytes_by_part(model)
        return {
            **loaded,
            "kernels": ops.backend_of(place).name,
            "peak_bytes": peak_bytes_on(place),
            **({} if place.type == "cpu" else {"host_peak_bytes": peak_bytes()}),
            "cache_bytes": meter.cache_bytes,
            "weight_bytes": sum(parts.values()),
            "prefill_weight_bytes": _read_bytes(model, parts, all_experts=True),
            "decode_weight_bytes": _read_bytes(model, parts, all_experts=False),
            "kv_bytes_per_token": meter.kv_bytes_per_token,
            "state_bytes": meter.state_bytes,
        }

    actions: dict[str, Step] = {
        "prefill": meter.prefill_seconds,
        "decode": meter.decode_seconds,
        "generate": meter.generate_seconds,
        "reading": meter.reading_seconds,
        "facts": facts,
    }
    return lambda kind, *arguments: actions[kind](*arguments)


def _load_here(folder: str, dtype: str | None, expert_memory: int | None) -> CausalLM:
    import torch

    from qnext.checkpoint import load_model
    from qnext.checkpoint.streamed import plan_residency

    residency = plan_residency(folder, expert_memory=expert_memory)
    if residency is None:
        _require_memory(folder, dtype)
    wanted = None if dtype is None else getattr(torch, dtype)
    return load_model(folder, dtype=wanted, check_finite=False, residency=residency)


def transformers_worker(*, folder: str, dtype: str | None, threads: int, decode_tokens: int) -> Step:
    """The same with transformers. What transformers cannot do with a model is a UsageError."""
    try:
        step = _transformers_step(folder, dtype, threads, decode_tokens)
    except DoesNotFit:
        raise
    except Exception as error:
        raise _refused(error) from error

    def checked(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Exception as error:
            raise _refused(error) from error

    return checked


def _refused(error: Exception) -> UsageError:
    first = (str(error).strip().splitlines() or [""])[0]
    return UsageError(f"peer transformers cannot run this model: {type(error).__name__}: {first}")


def _transformers_step(folder: str, dtype: str | None, threads: int, decode_tokens: int) -> Step:
    """A sequence at a depth grows from call to call, since transformers' cache cannot go back."""
    import torch

    from qnext.bench.speed import random_tokens

    # By name, since the package itself must never need it: only this comparison does.
    hf = importlib.import_module("transformers")
    _require_memory(folder, dtype)
    torch.set_num_threads(threads)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    start = time.perf_counter()
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    deep: dict[int, tuple[torch.Tensor, Any]] = {}

    def read(tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def prompt(num_tokens: int) -> torch.Tensor:
        return torch.tensor([random_tokens(num_tokens, vocab_size=model.config.vocab_size)])

    def prefill(num_tokens: int) -> float:
        tokens = prompt(num_tokens)
        start = time.perf_counter()
        read(tokens, None)
        return time.perf_counter() - start

    def decode(depth: int) -> float:
        # After one token there is no need to go on: the sequence begins anew.
        token, cache = deep[depth] if depth and depth in deep else read(prompt(max(depth, 1)), None)
        start = time.perf_counter()
        for _ in range(decode_tokens):
            token, cache = read(token, cache)
        seconds = time.perf_counter() - start
        deep[depth] = token, cache
        return seconds

    def facts() -> dict[str, Any]:
        return {**loaded, "peak_bytes": peak_bytes()}

    actions: dict[str, Step] = {"prefill": prefill, "decode": decode, "facts": facts}
    with torch.inference_mode():
        prefill(1)
    loaded = {"load_seconds": time.perf_counter() - start, "peak_bytes_loaded": peak_bytes()}
    return torch.inference_mode()(lambda kind, *arguments: actions[kind](*arguments))


def _require_memory(folder: str, dtype: str | None) -> None:
    """Raises DoesNotFit before weights are read that memory cannot hold beside what is loaded already.

    Loading reads the headers again, since its time is measured whole.
    """
    import torch

    from qnext.checkpoint.header import read_index
    from qnext.planning.plan import check_weights

    needed = 0
    for info in read_index(folder).tensors.values():
        needed += info.num_bytes if dtype is None else math.prod(info.shape) * getattr(torch, dtype).itemsize
    check_weights(folder, needed)


def _bytes_by_part(model: CausalLM) -> Counter[str]:
    """Bytes in memory of every field of planning.ParameterCounts, quantised weights with their scales."""
    from qnext.model import named_weights
    from qnext.planning import list_parameters

    infos = list_parameters(model.config)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[infos[name].part] += parameter.nbytes
    for name, weight in named_weights(model):
        parts[infos[name].part] += weight.nbytes
    return parts


def _read_bytes(model: CausalLM, parts: Counter[str], *, all_experts: bool) -> int:
    """Weights that one pass of the trunk and the head reads. Rows of the embedding are looked up, not read through."""
    config = model.config
    read = Counter(parts)
    del read["mtp"]
    if not config.tie_word_embeddings:
        del read["embedding"]
    if config.num_experts and not all_experts:
        read["experts"] = read["experts"] * config.num_experts_per_tok // config.num_experts
    return sum(read.values())
