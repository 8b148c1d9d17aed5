"""Compilers and states of grammars for tests, and outputs that follow them."""

from __future__ import annotations

import random
from functools import cache

import numpy as np

from qnext.engine.sampling.constraint import Constraint
from qnext.engine.sampling.grammar import GrammarCompiler, GrammarState, Vocabulary
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import byte_level_tokenizer, train_bpe

CORPUS = [
    "The quick brown fox jumps over the lazy dog; 3.14159 and 2024-11-21, yes or no.\n" * 8,
    '{"name": "Zoë", "tags": ["a", "b"], "age": 31, "ok": true, "none": null}\n' * 8,
    "你好，世界。 Ünïcödé naïve café 🙂🚀 \t\t x² ≠ y³\n" * 8,
]
PADDING = 13  # rows of a model's head above the tokenizer's last id


@cache
def tokenizer(kind: str) -> Tokenizer:
    backend = byte_level_tokenizer() if kind == "bytes" else train_bpe(CORPUS, vocab_size=600)
    return Tokenizer(backend, eos_tokens=["<|im_end|>", "<|endoftext|>"])


@cache
def compiler(kind: str = "bpe") -> GrammarCompiler:
    made = tokenizer(kind)
    return GrammarCompiler(
        Vocabulary(
            made.token_table(),
            eos_ids=made.eos_ids,
            special_ids=made.added_ids.values(),
            size=made.vocab_size + PADDING,
        )
    )


def state_of(constraint: Constraint, kind: str = "bpe") -> GrammarState:
    return compiler(kind).compile(constraint).new_state()


def ids_of(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def sampled(state: GrammarState, *, seed: int, end: float = 0.3, max_tokens: int = 4000) -> list[int]:
    """Random allowed tokens without the end token, ending where that is possible with probability `end`.

    Raises TimeoutError when no end comes.
    """
    draw = random.Random(seed)
    vocabulary = state._vocabulary
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        ids = ids_of(state.allowed())
        ends = [token for token in ids if token in vocabulary.eos_ids]
        rest = [token for token in ids if token not in ends]
        if ends and (not rest or draw.random() < end):
            state.accept(draw.choice(ends))
            assert state.is_finished
            return tokens
        closing = [token for token in rest if vocabulary.token_bytes[token] in (b"}", b"]", b'"')]
        tokens.append(draw.choice(closing if closing and draw.random() < 0.4 else rest))
        state.accept(tokens[-1])
    raise TimeoutError


def text_of(tokens: list[int], kind: str = "bpe") -> str:
    return b"".join(tokenizer(kind).token_bytes(token) for token in tokens).decode("utf-8")  # strict


def encoded(text: str, kind: str = "bpe") -> list[int]:
    return tokenizer(kind).encode(text)


def follow(state: GrammarState, text: str, kind: str = "bpe") -> GrammarState:
    for token in encoded(text, kind):
        state.accept(token)
    return state


def closed(**properties: object) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = {
    "person": closed(
        name={"type": "string", "maxLength": 8},
        age={"type": "integer", "minimum": 0, "maximum": 150},
        tags={"type": "array", "items": {"enum": ["red", "grün", "青", "🙂"]}, "minItems": 1, "maxItems": 3},
    ),
    "either": {"anyOf": [{"type": "null"}, {"type": "boolean"}, closed(x={"type": "number", "maximum": 10})]},
    "pattern": closed(code={"type": "string", "pattern": "^[A-Z]{2,3}-[0-9]+$", "maxLength": 12}),
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 3}, {"const": 7}],
        "items": False,
        "minItems": 2,
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": closed(
                v={"type": "integer", "minimum": 0, "maximum": 9},
                c={"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/node"}},
            )
        },
    },
    "unicode": closed(**{"schlüssel 🙂": {"enum": ['é\u0000"\\\u2028', "中文", ""]}}),
}
PATTERNS = [
    r"[a-c]{2,4}\d+",
    r"^(yes|no)$",
    r"(?i:ok)/[a-f]{1,3}",
    r"é[à-ü]{1,3}🙂?",
    r"a#b//c|x\/y",
    "a\nb?",
    r"\$\d\$",
    r"x|",
    r"[^\x00-\x7f]{1,2}",
]
CHOICES = ("yes", "no", "", "nope", 'a"b\\c/', "tab\tline\nend", "Zoë 🙂", "中文", "#//x", "\x7f\x00", "{}|()*")
LARK = """
start: expr
expr: term (("+" | "-") term)*
term: NUMBER | "(" expr ")"
NUMBER: /[0-9]{1,3}/
"""


def hybrid(kind: str, value: object) -> Constraint:
    """A constraint of a model that may begin with a thought by itself."""
    made = tokenizer("bpe")
    end = (made.token_id("</think>"),)
    return Constraint(kind, value, starts_after=end, opened_by=made.token_id("<think>"))  # type: ignore[arg-type]


CONSTRAINTS = [
    hybrid("json_object", ""),
    hybrid("choice", CHOICES),
    Constraint("json_schema", SCHEMAS["person"]),
    Constraint("json_schema", SCHEMAS["tree"]),
    Constraint("json_object"),
    Constraint("regex", PATTERNS[0]),
    Constraint("choice", CHOICES),
    Constraint("lark", LARK),
    Constraint("lark", 'start: a "!"\na[lazy]: /.*x/'),
    Constraint("regex", "[a-z]{1,9}", starts_after=(70,)),
]


def sampled_or_cut(state: GrammarState) -> None:
    draw = random.Random(1)
    for _ in range(40):
        state.accept(draw.choice(ids_of(state.allowed())))
