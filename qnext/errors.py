"""Errors that are the user's to mend, each with the exit code of the command line, and warnings about files."""

from __future__ import annotations

import difflib
import errno
import warnings
from collections.abc import Iterable

_HEAD, _TAIL = 600, 300  # characters of a long line that are kept


def one_line(text: str) -> str:
    """A message as one line of bearable length, whatever stands in it of files, arguments and names.

    What could end a line, move the cursor or hide text becomes an escape. Of a long one beginning and end are kept,
    and the number of characters between.

    >>> one_line("no file 'a\\nb'"), len(one_line("x" * 100_000))
    ("no file 'a\\\\nb'", 932)
    """
    if len(text) > _HEAD + _TAIL + 100:
        text = f"{text[:_HEAD]}[... {len(text) - _HEAD - _TAIL:,} more characters ...]{text[-_TAIL:]}"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


class QnextError(ValueError):
    """One clear line for the user; `exit_code` is what the process ends with."""

    exit_code = 2

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
    """What the system says and of which file, as one line."""
    return f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")


class CorruptCheckpoint(QnextError):
    """A checkpoint file is damaged or contradicts another; the message names file and key or tensor."""

    exit_code = 5


class ConfigError(CorruptCheckpoint):
    """A configuration value is unknown, missing or contradictory; the message names file and key."""


class NotSupported(QnextError):
    """A sound file in a form, or with a value, that is not implemented here; the message names the culprit."""

    exit_code = 6


class ConstraintFailed(QnextError):
    """The output of one request cannot follow its constraint any further; only that request ends."""

    exit_code = 2


class NotFinite(CorruptCheckpoint):
    """The model gave logits that are no finite numbers: weights are damaged, or overflow in this dtype."""


class RequestBroke(QnextError):
    """Something unforeseen broke at one request; only that request ends. `__cause__` is what it was."""

    exit_code = 2

    @classmethod
    def of(cls, cause: BaseException, doing: str) -> RequestBroke:
        """`doing` says what could not be done."""
        failure = cls(f"{doing} failed: {type(cause).__name__}")
        failure.__cause__ = cause
        return failure


def is_fault(error: BaseException) -> bool:
    """Whether it is an error, however deep a library raised it, and no wish to end the program."""
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


class QnextWarning(UserWarning):
    """Something in a file was passed over, and the result is as right as without it. `--strict` makes it `error`."""

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
