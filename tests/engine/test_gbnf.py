"""Grammars of llama.cpp: what they let through is what their rules say."""

from __future__ import annotations

import pytest

from qnext.engine.sampling.constraint import Constraint
from qnext.engine.sampling.gbnf import is_gbnf
from qnext.errors import UsageError
from tests.engine.grammar_ends import can_end, must_end
from tests.engine.grammars import compiler, encoded, state_of, tokenizer

JSON = r"""
root ::= object   # as many grammars begin
value ::= object | array | string | number | ("true" | "false" | "null") space
object ::= "{" space (
    string ":" space value
    ("," space string ":" space value)*
)? "}" space
array ::= "[" space ( value ("," space value)* )? "]" space
string ::= "\"" ( [^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" space
number ::= "-"? [0-9]+ ("." [0-9]+)? ([eE] [-+]? [0-9]+)? space
space ::= | " " | "\n" [ \t]{0,20}
"""


def fits(grammar: str, text: str) -> bool:
    state = state_of(Constraint("lark", grammar))
    for token in encoded(text):
        if not state.allows(token):
            return False
        state.accept(token)
    return can_end(state)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (
            JSON,
            ['{"a":[1, {"b": "x\\n"}, -2.5e3], "c":null}', "{}", "{\n}"],
            ["[1]", '{"a"}', '{"a": tru}', '{"a": 1,}'],
        ),
        ('root ::= "a" | "b"', ["a", "b"], ["", "ab"]),
        ('root ::= [a-c]+ "-" rest\nrest ::= "z"?', ["abc-", "a-z"], ["-z", "d-"]),
        ('root ::= item+\nitem ::= "- " [^\\n]+ "\\n"', ["- a\n- b c\n"], ["- \n", "a\n"]),
        ('root ::= sum\nsum ::= term ("+" term)*\nterm ::= [0-9]+ | "(" sum ")"', ["1+(22+3)"], ["1+", "()"]),
        ('root ::= "t" [a-z]* | "true!"', ["tree", "true", "true!"], ["x"]),
        ("root ::= .{2}", ["ab", "é!"], ["a", "abc"]),
        ('root ::= "\\u00e9" [\\u4e00-\\u9fff\\x41]', ["é中", "éA"], ["e中"]),
        ("root ::= [a-] [^\\]^]{1,2}", ["aa", "-b"], ["b", "a^"]),
        ('# two lines\nroot ::= a-b # x\n  | "q"\na-b ::= "x"{3}', ["xxx", "q"], ["xx"]),
        ('root ::= ("a" root)?', ["", "aa"], ["b"]),
        ('root ::= "say \\"hi\\"" "\\\\"', ['say "hi"\\'], ["say hi"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_texts_of_a_grammar(grammar: str, good: list[str], bad: list[str]) -> None:
    assert is_gbnf(grammar)
    assert [text for text in good if not fits(grammar, text)] == []
    assert [text for text in bad if fits(grammar, text)] == []


@pytest.mark.parametrize(
    "grammar",
    [
        'rule ::= "a"',
        "root ::= other",
        "root ::= (",
        'root ::= "a',
        "root ::= [",
        "root ::= *",
        "root ::= {2}",
        "root ::= " + "(" * 60 + ")" * 60,
        "root ::= root",
        "root ::= \\",
        "root ::= []",
        'root ::= "\\ud800"',
        "root ::= !<think>",
        'root ::= "a"\n"b" ::= "c"',
        'root ::= "\\U00110000"',
    ],
)
def test_faulty_grammars_are_refused_in_a_line(grammar: str) -> None:
    with pytest.raises(UsageError) as raised:
        compiler().compile(Constraint("lark", grammar))
    assert "\n" not in str(raised.value)


def test_special_tokens_can_be_named() -> None:
    state = state_of(Constraint("lark", 'root ::= "a" <tool_call> tail\ntail ::= "b"'))
    for token in (*encoded("a"), tokenizer("bpe").token_id("<tool_call>"), *encoded("b")):
        state.accept(token)
    assert must_end(state)


@pytest.mark.parametrize("grammar", ['start: "a"', "start: <think> x\nx: /a/", '?start: "::="', "start: A\nA: /::=/"])
def test_lark_is_no_gbnf(grammar: str) -> None:
    assert not is_gbnf(grammar)
