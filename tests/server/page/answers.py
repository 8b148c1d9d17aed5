"""What the mock server answers, by the last message that it gets."""

from __future__ import annotations

import json
from typing import Any

MARKDOWN = """## Why hybrid models stay quick

A **Gated DeltaNet** layer keeps one *fixed* state per sequence, so a token costs the same at 1,000 and at
262,144 tokens. Every fourth layer looks back at `all` of them.

| layer | memory per token | cost per token |
|:------|-----------------:|:---------------|
| DeltaNet | 0 bytes | constant |
| attention | 2 KiB | grows |

1. The router scores 512 experts,
2. ten of them work,
   - and one that is shared,
3. their answers are added.

```python
def route(x_TD, router_ED, top_k=10):
    # the largest scores choose
    scores_TE = softmax(x_TD @ router_ED.T)
    return scores_TE.topk(top_k)
```

> Only 3.7 % of the weights take part in a token.

More at https://example.com/qwen3-next and [in the paper](https://papers.example.org/delta?id=1).
"""

LONG_WORD = "x" * 5000
HOSTILE = {
    "html": (
        "<img src=x onerror=alert(1)> <script>alert(2)</script> <svg onload=alert(3)><circle r=9 /></svg>\n\n"
        "<style>body{display:none}</style>\n\n<iframe src='https://evil.example/'></iframe>\n\n"
        "<a href='javascript:alert(4)'>press</a> <math><mtext></mtext></math> <form action='https://evil.example'>"
    ),
    "links": (
        "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(2)) [c](data:text/html,<script>alert(3)</script>) "
        "[d](vbscript:x) [e](file:///etc/passwd) [f](//evil.example/x) [g](https://evil.example/?q=1) "
        "![h](https://evil.example/pixel.png) ![i](data:image/svg+xml,<svg onload=alert(4)>) <javascript:alert(5)> "
        "[\u0001javascript:alert(6)](\u0001javascript:alert(6)) [j](https://user:pw@evil.example/)"
    ),
    "code": "```html\n<script>alert(1)</script>\n<img src=x onerror=alert(2)>\n```\n`<b onclick=alert(3)>`",
    "table": "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| [x](javascript:alert(2)) | <script>3</script> |",
    "word": f"{LONG_WORD} and `{LONG_WORD}` and https://evil.example/{LONG_WORD[:1500]}",
    "direction": "safe \u202egnp.exe\u202c [bank\u202e.com](https://evil.example/) \u2066\u2067 `a\u202eb`",
    "quotes": ">" * 100_000,
    "brackets": "[" * 100_000,
    "brackets and stars": "[*" * 40_000 + "](http://a)" * 2_000,
    "stars": "*a _b **c " * 10_000,
    "closing stars": "*" * 20 + "a " + "a* b_ " * 15_000,
    "ticks": "".join("`" * (i % 300 + 1) + " " for i in range(600)),
    "fence": "```\n" + "unclosed <script>alert(1)</script>\n" * 2_500,
    "lists": "".join("  " * (i % 200) + "- x\n" for i in range(2_000)),
    "pipes": "|" * 50_000 + "\n" + "|-" * 25_000,
    "spaces": "#" + " " * 50_000 + "#" + " " * 50_000 + "`",
}

TOOL_ARGUMENTS = '{"city": "Oslo", "days": [1, 2], "html": "<img src=x onerror=alert(1)>"}'


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def words(text: str, field: str = "content") -> list[dict[str, Any]]:
    """Deltas of a few characters each."""
    return [delta(**{field: text[at : at + 7]}) for at in range(0, len(text), 7)]


def thoughts(text: str) -> list[dict[str, Any]]:
    return [delta(reasoning_content=text[at : at + 9], reasoning=text[at : at + 9]) for at in range(0, len(text), 9)]


def tool_call() -> list[dict[str, Any]]:
    head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    parts = [TOOL_ARGUMENTS[:11], TOOL_ARGUMENTS[11:30], TOOL_ARGUMENTS[30:]]
    return [
        delta(tool_calls=[head]),
        *[delta(tool_calls=[{"index": 0, "function": {"arguments": part}}]) for part in parts],
    ]


def chunks_for(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The deltas that answer `message`, the last of a conversation."""
    text = message["content"]
    if message["role"] == "tool":
        return words(f"The tool said: {text}")
    if text.startswith("hostile "):
        body = HOSTILE[text.removeprefix("hostile ")]
        size = max(40, len(body) // 6)
        return [delta(content=body[at : at + size]) for at in range(0, len(body), size)]
    if text.startswith("think"):
        return thoughts("First I look at the *question*. Then I answer it.") + words("The answer is 42.")
    if text.startswith("tool"):
        return tool_call()
    if text.startswith("markdown"):
        return words(MARKDOWN)
    if text.startswith("long"):
        return words("A line of some length, as they come. " * 400)
    if text.startswith("show"):
        # for pictures
        return thoughts("They ask about the architecture. I keep to what matters for speed.") + words(MARKDOWN)
    return words(f"You said: {text}")


def events(chunks: list[dict[str, Any]]) -> list[str]:
    """Server-sent events in the awkward forms that are allowed: comments, CRLF, one event over two data lines."""
    made = [": ping\n\n"]
    for number, chunk in enumerate(chunks):
        text = json.dumps(chunk, ensure_ascii=False)
        if number % 3 == 1:
            made.append(f"data: {text}\r\n\r\n")
        elif number % 3 == 2 and ", " in text:
            head, _, tail = text.partition(", ")
            made.append(f"data: {head},\ndata:{tail}\n\n")
        else:
            made.append(f"data: {text}\n\n")
    return made
