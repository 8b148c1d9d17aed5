"""The few calls in which commits differ, the new form first, and what must be pinned so that only code decides."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import io
import pkgutil
import random
import threading  # noqa: F401 - takes the real clock before another takes its place
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any


class Clock:
    """Stands still within a step, so that deadlines and measured times are the same in every run."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class InlineReader(ThreadPoolExecutor):
    """Reads cached prefixes at once: when a thread would be done depends on the machine."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self._thread_name_prefix.startswith("prefix-cache"):
            return super().submit(fn, *args, **kwargs)
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


CLOCK = Clock()
time.monotonic = CLOCK  # type: ignore[assignment]
concurrent.futures.ThreadPoolExecutor = InlineReader  # type: ignore[misc]
qnext = importlib.import_module("qnext")  # behind the clock, and before torch


def checkout() -> str:
    """Where the qnext lies that is looked at."""
    return str(Path(qnext.__file__ or "").parent.parent)


def find(name: str, *homes: str) -> Any:
    """What is called `name`, in the first of these modules that has it, else wherever qnext defines it."""
    for home in homes:
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(home), name)
    for module in pkgutil.walk_packages(qnext.__path__, "qnext."):
        if not module.name.endswith(("__main__", "_worker")):
            with contextlib.suppress(ImportError):
                found = getattr(importlib.import_module(module.name), name, None)
                if getattr(found, "__module__", None) == module.name:
                    return found
    raise LookupError(f"{name} is nowhere in qnext; benchmarks/same_bits/house.py must learn its new name")


def make_engine(model: Any, options: dict[str, Any]) -> Any:
    """An engine with these options, by their names as keywords or as fields of a configuration."""
    engine = find("Engine", "qnext.engine")
    if not hasattr(engine, "of"):
        return engine(model, **options)
    return engine.of(model, find("EngineConfig", "qnext.engine")(**options))


def rest(engine: Any, request: Any, *, is_parked: bool) -> None:
    """A parked request holds nothing until it is to go on."""
    engine.rest(request, is_parked=is_parked)


def set_num_threads(count: int) -> None:
    """Threads of torch and of the kernels."""
    find("set_num_threads", "qnext.ops", "qnext.ops.backends", "qnext.ops.backend")(count)


def command_line(*arguments: object) -> tuple[int, str]:
    """Exit code and stdout of a verb, called in this process."""
    from qnext.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    if code:
        raise RuntimeError(f"qnext {' '.join(map(str, arguments))} ended with {code}: {err.getvalue()}")
    return int(code or 0), out.getvalue()


class DraftPins:
    """How many tokens are drafted: by chance where `rng` is set, else by the policy from times that sizes decide."""

    def __init__(self) -> None:
        self.rng: random.Random | None = None

    def install(self) -> None:
        """In the class of the policy, wherever it lives."""
        lengths = find("DraftLengths", "qnext.engine.policy.draft_lengths", "qnext.engine.speculation.draft_lengths")
        after_init, choose = lengths.__post_init__, lengths.choose
        observe_step, observe_probe = lengths.observe_step, lengths.observe_probe
        pins = self

        def pinned_init(self: Any) -> None:
            after_init(self)
            for estimate, unit in ((self.steps, 1e-3), (self.passes, 1e-4)):
                estimate.observe = _pinned_estimate(estimate.observe, unit)

        def pinned_choose(self: Any, requests: Any, most: Any) -> list[int]:
            if pins.rng is None:
                return choose(self, requests, most)
            return [pins.rng.randint(0, max(0, limit)) for limit in most]

        lengths.__post_init__ = pinned_init
        lengths.choose = pinned_choose
        lengths.observe_step = lambda self, num_tokens, seconds: observe_step(self, num_tokens, _seconds(num_tokens))
        lengths.observe_probe = lambda self, seconds: observe_probe(self, 2e-4 if seconds else 0.0)


def _seconds(size: int, unit: float = 1e-3) -> float:
    return unit * (1 + 0.05 * size)


def _pinned_estimate(observe: Callable[[int, float], None], unit: float) -> Callable[[int, float], None]:
    return lambda size, seconds: observe(size, _seconds(size, unit))
