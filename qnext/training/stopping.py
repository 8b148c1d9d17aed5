"""Ends a run after the current step when a signal comes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from qnext.interrupts import raise_for

if TYPE_CHECKING:
    from qnext.training.loop import Trainer


class Stop:
    """The signal that asked a run to end, if one did."""

    number: int | None = None

    def raise_for(self) -> None:
        """End the command in the way that the signal asks for."""
        raise_for(self.number or signal.SIGINT)


@contextmanager
def interruptible(trainer: Trainer, note: Callable[[str], None]) -> Iterator[Stop]:
    """While this is open, the first Ctrl-C, SIGTERM or SIGHUP ends the run after its step, and the second one ends it
    at once.

    `note` is told of the first signal.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if trainer.should_stop:
            raise_for(number)
        stop.number = number
        trainer.should_stop = True
        note("finishing the step; Ctrl-C again ends at once")

    numbers = [
        number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(number))
    ]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
