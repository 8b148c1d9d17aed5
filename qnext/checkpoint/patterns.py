"""Module names and patterns in a quantization_config. No torch.

The patterns come from an untrusted file, so a pattern that could take exponential time is refused.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Container, Iterable

MAX_PATTERN_LENGTH = 500
# Steps that one pattern may take on one name: four times "any number of anything" and a few choices.
_MAX_STEPS = 2e8
_REPEAT_STEPS = 40.0  # about what a repeat can be tried on: a name has some forty to seventy letters
_MAX_SECONDS = 30.0
_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")  # what torch and PEFT put before names


class PatternError(ValueError):
    """A pattern that is no regular expression or would take too long."""


class ModuleNames:
    """Exact names, and patterns that match from the beginning of a name, as in compressed-tensors and GPTQModel."""

    def __init__(self, names: Iterable[str], patterns: Iterable[str]) -> None:
        self.names = frozenset(_canonical(name) for name in names)
        self._patterns = [_compile(_canonical(pattern)) for pattern in patterns]
        self._seconds = 0.0

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str)
        if name in self.names:
            return True
        if not self._patterns:
            return False
        begin = time.monotonic()
        found = any(pattern.match(name) is not None for pattern in self._patterns)
        self._seconds += time.monotonic() - begin
        if self._seconds > _MAX_SECONDS:
            raise PatternError(f"{len(self._patterns)} patterns took more than {_MAX_SECONDS:.0f} seconds")
        return found


class NamePieces:
    """Names that mean every module whose path contains them, in whole pieces: mlp.gate does not match mlp.gate_proj."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(tuple(_canonical(name).strip(".").split(".")) for name in names)

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str)
        pieces = name.split(".")
        ends = range(1, len(pieces) + 1)
        return any(tuple(pieces[start:end]) in self._names for end in ends for start in range(end))


class OtherModules:
    """Every module whose name contains `within` and that `inside` does not match."""

    def __init__(self, inside: Container[str], *, within: str) -> None:
        self._inside = inside
        self._within = within

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str)
        return self._within in name and name not in self._inside


def module_names(names: Iterable[str]) -> ModuleNames:
    """Names in the form of compressed-tensors: a pattern has the prefix re:."""
    listed = list(names)
    return ModuleNames(
        (name for name in listed if not name.startswith("re:")), (name[3:] for name in listed if name.startswith("re:"))
    )


def searched(pattern: str) -> ModuleNames:
    """A pattern that may match anywhere in a name."""
    return ModuleNames((), [pattern if pattern.startswith(("^", ".*")) else f".*{pattern}"])


def _canonical(name: str) -> str:
    """Names in wrappers of the same text model, as names or in patterns."""
    name = name.replace(r"language_model\.", "").replace("language_model.", "")
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _compile(pattern: str) -> re.Pattern[str]:
    shown = repr(pattern[:80])
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(f"pattern {shown} has {len(pattern)} letters, at most {MAX_PATTERN_LENGTH} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets that a later Python may read otherwise
            compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{shown} is no regular expression ({error})") from None
    if _most_steps(pattern) > _MAX_STEPS:
        raise PatternError(f"pattern {shown} is refused: it could take too long to match")
    return compiled


def _most_steps(pattern: str) -> float:
    """How often a backtracking matcher may try: the product over all repeats, options and choices."""
    steps = 1.0
    choices = [1]
    i = 0
    while i < len(pattern):
        letter = pattern[i]
        if letter == "\\":
            i += 1
        elif letter == "[":
            i = _end_of_set(pattern, i)
        elif letter == "(":
            choices.append(1)
            if pattern[i + 1 : i + 2] == "?":
                if pattern[i + 2 : i + 3].isalpha() and pattern[i + 2] != "P":
                    return float("inf")  # flags change how the rest is read
                i += 1
        elif letter == ")":
            steps *= choices.pop()
            if pattern[i + 1 : i + 2] in ("*", "+", "{"):
                return float("inf")
        elif letter == "|":
            choices[-1] += 1
        elif letter in "*+{":
            steps *= _REPEAT_STEPS
        elif letter == "?":
            steps *= 2
        i += 1
    return steps * choices[0]


def _end_of_set(pattern: str, start: int) -> int:
    """Index of the ] that closes the set which begins at `start`; a ] in the first place is one of its letters."""
    i = start + 1
    if pattern[i : i + 1] == "^":
        i += 1
    i += 1
    while pattern[i] != "]":
        i += 2 if pattern[i] == "\\" else 1
    return i
