"""Requests of a running engine, seen and changed on their way through the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from qnext.engine.engine import Engine
from qnext.engine.execution.local import LocalExecutor
from qnext.errors import NotSupported, UsageError
from qnext.probe import EVERYWHERE, Edit, Glance, ModelProbe, Observer, Where


@contextmanager
def probed(
    engine: Engine,
    taps: Sequence[str] | Mapping[str, Where] = (),
    *,
    where: Where = EVERYWHERE,
    edits: Sequence[Edit] = (),
    observer: Observer | None = None,
) -> Iterator[ModelProbe]:
    """A ModelProbe on the steps of an engine in the block. Sequences have the ids of their requests.

    What a cached prefix has is not computed, so it is not seen. An edit would stay in the prefixes that others share:
    it needs an engine without prefix cache, and one of states an engine without drafts. Raises UsageError for others,
    and for a tap that is none; NotSupported where the model is not in this process.
    """
    executor = engine.executor
    if not isinstance(executor, LocalExecutor):
        raise NotSupported("probes need a model in the process of the engine")
    if edits and engine.scheduler.limits.has_prefix_cache:
        raise UsageError("an edit would stay in prefixes that others share; make the engine with prefix_cache=False")
    probe = ModelProbe(executor.model, taps, where=where, edits=edits, observer=observer)
    states = [tap for tap in sorted(probe.sight.edited) if tap.endswith(".delta.state")]
    if states and engine.drafter is not None:
        raise UsageError(f"{states[0]}: drafted tokens change no state that an edit could change; turn off speculation")
    executor.request_of_slot, executor.watch.probe = probe.sight.names, probe
    try:
        with probe:
            yield probe
    finally:
        executor.request_of_slot = executor.watch.probe = None


def glance_at(engine: Engine) -> Glance | None:
    """What one of the last steps showed of gates and states; one of the next will be looked at. Any thread may ask.
    None before the first, and where the model is not in this process."""
    executor = engine.executor
    return executor.glance() if isinstance(executor, LocalExecutor) else None
