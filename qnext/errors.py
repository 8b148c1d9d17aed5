"""Errors that the user can correct, each with the exit code of the command line, and warnings about files."""

from __future__ import annotations

import difflib
import errno
import warnings
from collections.abc import Iterable

_HEAD, _TAIL = 600, 300  # characters of a long line that are kept


def one_line(text: str) -> str:
    """A message as one line of limited length, whatever files, arguments and names it repeats.

    Characters that end a line, move the cursor or hide text become escapes. A long value keeps its beginning, its end
    and the number of characters between them.

    >>> one_line("no file 'a\\nb'"), len(one_line("x" * 100_000))
    ("no file 'a\\\\nb'", 932)
    """
    if len(text) > _HEAD + _TAIL + 100:
        text = f"{text[:_HEAD]}[... {len(text) - _HEAD - _TAIL:,} more characters ...]{text[-_TAIL:]}"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


class QnextError(ValueError):
    """One clear line for the user; `exit_code` is what the process ends with. What raised one that `ends_engine` can do
    nothing more."""

    exit_code = 2
    ends_engine = False

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class UsageError(QnextError):
    """Contradictory or impossible arguments."""

    exit_code = 2


class ModelNotFound(QnextError):
    """No such folder, preset or hub name."""

    exit_code = 3


class DoesNotFit(QnextError):
    """The request needs more memory or context than there is; the message says what would fit."""

    exit_code = 4


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(DoesNotFit, OSError):
    """A disk or a quota is full; the message names the file and says what became of it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno, self.strerror = errno.ENOSPC, message

    def __str__(self) -> str:
        return str(self.strerror)


def line_of(error: OSError) -> str:
    """The system's message and the file that it is about, as one line."""
    return f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")


class CorruptCheckpoint(QnextError):
    """A checkpoint file is damaged or contradicts another; the message names file and key or tensor."""

    exit_code = 5


class ConfigError(CorruptCheckpoint):
    """A configuration value is unknown, missing or contradictory; the message names file and key."""


class NotSupported(QnextError):
    """An undamaged file in a form, or with a value, that is not implemented here; the message names the cause."""

    exit_code = 6


class LostRank(QnextError):
    """A process of a model that runs on several is gone or does not answer; the message names its rank."""

    exit_code = 7
    ends_engine = True

    @classmethod
    def because(cls, message: str, exit_code: int) -> LostRank:
        """A rank has ended with an error of its own."""
        lost = cls(message)
        lost.exit_code = exit_code
        return lost


class ConstraintFailed(QnextError):
    """The output of one request cannot follow its constraint any further; only that request ends."""

    exit_code = 2


class NotFinite(CorruptCheckpoint):
    """The model gave logits that are no finite numbers: weights are damaged, or overflow in this dtype."""


class RequestBroke(QnextError):
    """An unforeseen error in one request; only that request ends. `__cause__` is the error."""

    exit_code = 2

    @classmethod
    def of(cls, cause: BaseException, doing: str) -> RequestBroke:
        """`doing` says what could not be done."""
        failure = cls(f"{doing} failed: {type(cause).__name__}")
        failure.__cause__ = cause
        return failure


def is_fault(error: BaseException) -> bool:
    """Whether it is an error, however deep in a library, and no request to end the program."""
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def ends_engine(error: BaseException) -> bool:
    """Whether the engine that raised it can do nothing more, for no request."""
    return isinstance(error, QnextError) and error.ends_engine


class QnextWarning(UserWarning):
    """Something in a file was ignored, and the result is correct without it. `--strict` turns it into `error`."""

    def __init__(self, message: str, error: type[QnextError] = ConfigError) -> None:
        super().__init__(one_line(message))
        self.error = error


def warn(message: str, *, error: type[QnextError] = ConfigError) -> None:
    """Tell the user one line. The command line prints it once on stderr; a library caller filters it as a warning."""
    warnings.warn(QnextWarning(message, error), stacklevel=2)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a wrong name: "; did you mean x?" with the nearest, or nothing where none is near.

    >>> did_you_mean("sevre", ["serve", "train"]), did_you_mean("walrus", ["serve", "train"])
    ('; did you mean serve?', '')
    """
    by_plain = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), by_plain, n=1, cutoff=0.6)
    return f"; did you mean {by_plain[near[0]]}?" if near else ""
