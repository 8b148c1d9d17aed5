"""Where a context ends and its continuation begins, in tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM as Base
else:
    Base = object


class KeepsContinuations(Base):
    """Before a model of the harness: a continuation is never without tokens.

    The harness takes what the tokens of both have behind those of the context. Where the last token of the context
    swallows the continuation, such as "(" and ")" in one token, nothing is left, and nothing would cost nothing.
    """

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        return (before, after) if after else (self._ids(context), self._ids(continuation))

    def _ids(self, text: str) -> list[int]:
        found: Any = self.tok_encode(text)
        return list(found)
