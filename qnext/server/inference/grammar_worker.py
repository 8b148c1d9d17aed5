"""Child process that compiles output constraints, forced calls of tools among them; run as a file by `served.py`."""

from __future__ import annotations

from typing import Any

from qnext.confined.child import AnswerRequest, serve
from qnext.engine.sampling.grammar_worker import begin_with
from qnext.server.inference.forced_calls import written_calls


def begin(setup: dict[str, Any]) -> AnswerRequest:
    return begin_with(setup, {"calls": written_calls})


if __name__ == "__main__":
    serve(begin)
