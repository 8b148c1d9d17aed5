"""Child process that tokenises what cannot be cut and may take long, run as a file by `qnext.text.tokenizer`.

Requests: `{"text": ...}` gives `{"count": number of tokens}`, and `{"begin": i, "end": j}` then some of its ids.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when the library is loaded

from tokenizers import Tokenizer

from qnext.confined.child import AnswerRequest, serve


def begin(setup: dict[str, Any]) -> AnswerRequest:
    backend = Tokenizer.from_str(setup["tokenizer"])
    ids: list[int] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal ids
        if "text" not in request:
            return {"ids": ids[request["begin"] : request["end"]]}
        ids = []
        try:
            (encoding,) = backend.encode_batch_fast([request["text"]], add_special_tokens=False)
        except MemoryError:
            raise
        except BaseException as error:  # a panic of the library is no Exception
            return {"fault": "tokenizer", "message": f"{type(error).__name__}: {error}"}
        ids = encoding.ids
        return {"count": len(ids)}

    return answer


if __name__ == "__main__":
    serve(begin)
