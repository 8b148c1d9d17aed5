"""Signals that end a command: unfinished work is undone, and the exit code is 128 plus the signal's number."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: the terminal, or the connection to it, is gone.
ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_LATER_SECONDS = 0.02


class Terminated(SystemExit):
    """SIGTERM or SIGHUP came. `code` is the exit code."""

    code: int

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def raise_for(number: int) -> None:
    """Raise the exception that ends the process for a signal: KeyboardInterrupt for Ctrl-C, Terminated for the
    others."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(number)


class Ending:
    """The signals of one command. The first one raises in the main thread; a second one ends the process at once.

    `number` is the signal that came. A signal waits while a module is imported, because an exception during torch's
    import aborts the process, and while a folder is deleted, because the folder would stay. An exception that other
    code swallows, a destructor for example, is raised again.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._numbers: list[int] = []

    def begin(self) -> None:
        """Handle the signals that are not ignored. `nohup` ignores some, and so do shells for background processes."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._numbers = [number for number in ENDING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._raise) for number in self._numbers}
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable

    def end(self, *, is_last: bool) -> None:
        """Restore the handlers. Where the process ends now, a later signal ends it without a message."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL if is_last else self._previous[number])
        if self._numbers:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = self._unraisable

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            for each in self._numbers:
                signal.signal(each, signal.SIG_DFL)
        if _must_not_end_here(frame):
            self._raise_later()
        else:
            raise_for(self.number)

    def _raise_later(self) -> None:
        signal.signal(signal.SIGALRM, self._raise)
        signal.setitimer(signal.ITIMER_REAL, _LATER_SECONDS)

    def _on_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        if self.number is None or not isinstance(unraisable.exc_value, (KeyboardInterrupt, Terminated)):
            self._unraisable(unraisable)
            return
        self._raise_later()


def _must_not_end_here(frame: FrameType | None) -> bool:
    """Whether a module is being imported, or a folder deleted, where the signal came."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == "<frozen importlib._bootstrap>":
            return True
        if code.co_name == "rmtree" and code.co_filename.endswith("shutil.py"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def held() -> Iterator[None]:
    """While this is open, a signal that would end the command waits. It is delivered when the block ends.

    It is for the few statements between the creation of a resource and the statement that guarantees its clean-up. It
    acts in the main thread; elsewhere no signal is handled, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    previous = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    ours = {number: handler for number, handler in previous.items() if callable(handler)}
    for number in ours:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


@contextmanager
def repeated_interrupts() -> Iterator[None]:
    """While this is open, every Ctrl-C raises KeyboardInterrupt, for code that catches it and continues."""
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
