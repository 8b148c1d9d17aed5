"""Prompts for a load: random token ids of exact lengths, or prompts of a file."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from qnext.client.remote import refusal, unreachable
from qnext.errors import UsageError

if TYPE_CHECKING:
    import httpx2

_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
)
_ROUNDS = 4  # to find a text of a number of tokens


@dataclass(frozen=True)
class LoadPrompt:
    """A prompt as text or token ids, and the maximum of tokens in its answer."""

    content: str | list[int]
    num_output: int


@dataclass(frozen=True)
class RandomPrompts:
    """Random prompts with lengths in tokens. `range_ratio` r draws lengths evenly between 1 - r and 1 + r times the
    given length."""

    input_len: int
    output_len: int
    prefix_len: int = 0  # the same for all prompts, before `input_len`
    range_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.input_len < 0 or self.prefix_len < 0 or self.input_len + self.prefix_len < 1 or self.output_len < 1:
            raise UsageError("a prompt and an answer need at least one token each")
        if not 0 <= self.range_ratio < 1:
            raise UsageError(f"--random-range-ratio must be in [0, 1), not {self.range_ratio:g}")

    def make(self, number: int, vocabulary: Sequence[int], *, seed: int) -> list[LoadPrompt]:
        """Prompts of token ids, the same for the same seed."""
        chance = random.Random(seed)
        prefix = chance.choices(vocabulary, k=self.prefix_len)
        found: list[LoadPrompt] = []
        for _ in range(number):
            size, num_output = self._drawn(chance, self.input_len), self._drawn(chance, self.output_len)
            ids = prefix + chance.choices(vocabulary, k=size)
            found.append(LoadPrompt(ids or chance.choices(vocabulary, k=1), max(1, num_output)))
        return found

    def _drawn(self, chance: random.Random, length: int) -> int:
        spread = int(length * self.range_ratio)
        return chance.randint(length - spread, length + spread)


class PromptServer:
    """The tokenizer of the server under load. Raises UsageError where the server does not describe it."""

    def __init__(self, client: httpx2.Client, model: str) -> None:
        self.client = client
        self.model = model

    def vocabulary(self) -> Sequence[int]:
        """All token ids. Where the server does not report their number, the ids of some common words."""
        import httpx2

        try:
            response = self.client.get("/tokenizer_info")
        except httpx2.HTTPError as error:
            raise unreachable(str(self.client.base_url), error) from None
        if response.status_code == 200:
            size = response.json().get("vocab_size")
            if isinstance(size, int) and size > 0:
                return range(size)
        return sorted(set(self._post("/tokenize", {"prompt": _WORDS})["tokens"]))

    def as_text(self, prompt: LoadPrompt) -> LoadPrompt:
        """Text of about the same number of tokens, for routes that take no ids. It is cut or filled until it has the
        number."""
        assert isinstance(prompt.content, list)
        wanted, ids = len(prompt.content), prompt.content
        text = ""
        for _ in range(_ROUNDS):
            text = self._post("/detokenize", {"tokens": ids})["prompt"]
            found = self._post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
            if len(found) == wanted:
                break
            ids = (found + found)[:wanted] if len(found) * 2 >= wanted else found + prompt.content[len(found) : wanted]
        return LoadPrompt(text, prompt.num_output)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = self.client.post(path, json={"model": self.model, **body})
        if response.status_code != 200:
            words = refusal(str(self.client.base_url).rstrip("/"), response.status_code, response.content)
            raise UsageError(f"{words}; random prompts need {path} there, or give --dataset-name custom")
        return response.json()


def prompts_of_file(path: Path, number: int, *, output_len: int, seed: int) -> list[LoadPrompt]:
    """`number` prompts of a file in random order. A file with fewer prompts is used again from its beginning.

    The file is JSONL or one JSON list. Entries are {"prompt", "output_tokens"} or ShareGPT's {"conversations":
    [{"value"}]}. Raises OSError, and UsageError naming an entry that has neither form.
    """
    prompts = list(_entries(path, output_len))
    if not prompts:
        raise UsageError(f"{path}: holds no prompt")
    random.Random(seed).shuffle(prompts)
    return [prompts[index % len(prompts)] for index in range(number)]


def _entries(path: Path, output_len: int) -> Iterator[LoadPrompt]:
    raw = path.read_bytes()
    try:
        is_list = raw.lstrip().startswith(b"[")
        values = orjson.loads(raw) if is_list else [orjson.loads(line) for line in raw.splitlines() if line.strip()]
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error}") from None
    for number, value in enumerate(values, start=1):
        try:
            turns = value.get("conversations")
            text = turns[0]["value"] if turns is not None else value["prompt"]
            num_output = value.get("output_tokens", output_len)
        except (AttributeError, KeyError, TypeError, IndexError):
            raise UsageError(f"{path}: entry {number} has neither prompt nor conversations") from None
        if not isinstance(text, str) or not text or not isinstance(num_output, int) or num_output < 1:
            raise UsageError(f"{path}: entry {number}: prompt must be a text and output_tokens a number")
        yield LoadPrompt(text, num_output)
