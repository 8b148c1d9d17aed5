"""Child process that compiles output constraints, run as a file by `qnext.engine.sampling.compiling`.

It has the vocabulary and the library. A constraint that compiles here, within the limits, is compiled again by the
parent: matchers cannot be sent.

Requests: what `constraint.request_of` makes. Answers: `{"text": grammar, "held_bytes": of its matcher, "is_worn": what
it needed was much, and the process is better not used again}`, or `{"refusal": line}`.
"""

from __future__ import annotations

import base64
import ctypes
import resource
from array import array
from collections.abc import Mapping
from typing import Any

from qnext.confined.child import AnswerRequest, serve
from qnext.engine.sampling.constraint import GrammarLimits, LarkWriter, constraint_of, grammar_text
from qnext.engine.sampling.matchers import MatcherFactory, one_line
from qnext.errors import UsageError

_STACK_BYTES = 64 << 20  # the library recurses along rules; the parent's threads have as much
_WORN_PART = 4  # a process that keeps so small a part of what it may use is as good as new


class _HeapInfo(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def begin_with(setup: dict[str, Any], writers: Mapping[str, LarkWriter]) -> AnswerRequest:
    """What answers, for a program that writes grammars of kinds of its own."""
    limits = GrammarLimits(**setup["limits"])
    most = resource.getrlimit(resource.RLIMIT_STACK)[1]
    wanted = _STACK_BYTES if most == resource.RLIM_INFINITY else min(most, _STACK_BYTES)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, most))
    factory = MatcherFactory(
        unpacked_bytes(setup["vocabulary"]),
        eos_ids=setup["vocabulary"]["eos_ids"],
        special_ids=setup["vocabulary"]["special_ids"],
        limits=limits,
    )
    used_bytes = _address_bytes()
    most_bytes = used_bytes + limits.compile_memory_bytes + wanted
    if 0 < most_bytes < resource.getrlimit(resource.RLIMIT_AS)[1]:
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        kind = "tools" if request["kind"] == "calls" else request["kind"]
        try:
            text = grammar_text(constraint_of(request), limits, writers=writers)
            before = _held_bytes()
            try:
                matcher = factory.build(text)
            except UsageError as error:
                raise UsageError(f"{kind}: {error}") from None
            held = max(0, _held_bytes() - before)
            if held > limits.max_held_bytes:
                raise UsageError(
                    f"{kind}: too large: its compiled form takes more than {limits.max_held_bytes >> 20} MiB"
                )
            del matcher
        except UsageError as error:
            return {"refusal": str(error), "is_worn": is_worn()}
        except MemoryError:
            raise
        except RecursionError:
            return {"refusal": f"{kind}: nested too deeply", "is_worn": is_worn()}
        except BaseException as error:  # a panic of the library is no Exception
            return {"refusal": f"{kind}: {one_line(str(error))}", "is_worn": True}
        return {"text": text, "held_bytes": held, "is_worn": is_worn()}

    def is_worn() -> bool:
        return _address_bytes() - used_bytes > limits.compile_memory_bytes // _WORN_PART

    return answer


def unpacked_bytes(packed: Mapping[str, Any]) -> list[bytes]:
    """The bytes of each token, from what `Vocabulary.packed` made."""
    whole = base64.b64decode(packed["bytes"])
    lengths = array("I")
    lengths.frombytes(base64.b64decode(packed["lengths"]))
    found: list[bytes] = []
    at = 0
    for length in lengths:
        found.append(whole[at : at + length])
        at += length
    return found


def _address_bytes() -> int:
    """Address space of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _held_bytes() -> int:
    """What the heap holds, exactly where the C library can tell."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return _address_bytes()
    library.mallinfo2.restype = _HeapInfo
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def begin(setup: dict[str, Any]) -> AnswerRequest:
    return begin_with(setup, {})


if __name__ == "__main__":
    serve(begin)
