"""A continuation that the last token of its context swallows still has tokens."""

from __future__ import annotations

from qnext.harness.pairs import KeepsContinuations


class Merging:
    """As the harness encodes pairs, with one token for "()"."""

    def tok_encode(self, text: str) -> list[int]:
        return [1 if piece == "()" else 2 + ord(piece) for piece in text.replace("()", "\0").replace("\0", "P")]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        whole, before = self.tok_encode(context + continuation), self.tok_encode(context)
        return before, whole[len(before) :]


class Kept(KeepsContinuations, Merging):
    pass


def test_nothing_is_swallowed() -> None:
    merging, kept = Merging(), Kept()
    assert merging._encode_pair("main(", ")")[1] == []
    before, after = kept._encode_pair("main(", ")")
    assert (before, after) == (merging.tok_encode("main("), merging.tok_encode(")"))
    assert kept._encode_pair("ab", "cd") == merging._encode_pair("ab", "cd")
