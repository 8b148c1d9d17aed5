"""Modules of the page alone: the parser of events, the tree, Markdown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Page

STREAM = (
    '\ufeff: hello\r\n\r\ndata: {"a": "ü🦉"}\n\ndata:one\ndata: two\r\n\r\n'
    "event: x\rdata: three\r\rid: 4\n\ndata\n\ndata: end"
)
EVENTS = ['{"a": "ü🦉"}', "one\ntwo", "three", "", "end"]


@pytest.fixture(scope="module")
def modules(browser: Any, served: Any) -> Any:
    """A page that may import the modules; nothing in these tests changes it."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(served[1])
    yield page
    context.close()


def test_events_may_be_cut_anywhere(modules: Page) -> None:
    found = modules.evaluate(
        """async (text) => {
          const { EventParser } = await import("/page/sse.js");
          const results = [];
          for (let size = 1; size <= text.length; size++) {
            const parser = new EventParser();
            const events = [];
            for (let at = 0; at < text.length; at += size) events.push(...parser.push(text.slice(at, at + size)));
            results.push([...events, ...parser.end()]);
          }
          return results;
        }""",
        STREAM,
    )
    assert len(found) == len(STREAM.encode("utf-16-le")) // 2
    assert all(events == EVENTS for events in found)


def test_bytes_may_be_cut_inside_of_characters(modules: Page) -> None:
    found = modules.evaluate(
        """async (text) => {
          const { events } = await import("/page/sse.js");
          const bytes = new TextEncoder().encode(text);
          const body = new ReadableStream({
            start(to) {
              for (const byte of bytes) to.enqueue(new Uint8Array([byte]));
              to.close();
            },
          });
          const found = [];
          for await (const data of events(new Response(body))) found.push(data);
          return found;
        }""",
        STREAM,
    )
    assert found == EVENTS


MARKDOWN = """# One

para *em* **strong** ***both*** ~~gone~~ `co*de`
next line

- a
- b

  still b
  1. deep
- c

| x | y |
|---|--:|
| 1 | 2 |

> quote
> > inner

```js
const a = "</script>"; // note
```
after [link](https://a.example/b) \\*plain\\* snake_case_word 2*3*4
---
1) first
2) second
"""


def render(modules: Page, text: str, cuts: list[int]) -> str:
    return modules.evaluate(
        """async ([text, cuts]) => {
          const { MarkdownView } = await import("/page/markdown.js");
          const view = new MarkdownView();
          for (const cut of cuts) view.update(text.slice(0, cut), false);
          view.update(text, true);
          return view.element.innerHTML;
        }""",
        [text, cuts],
    )


def test_markdown_that_grows_ends_as_markdown_at_once(modules: Page) -> None:
    """Letter by letter, and in strides: the settled blocks never differ from those of the whole text."""
    whole = render(modules, MARKDOWN, [])
    for stride in (1, 2, 7, 40):
        assert render(modules, MARKDOWN, list(range(0, len(MARKDOWN), stride))) == whole


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("***both***", "<em><strong>both</strong></em>"),
        ("snake_case_word", "snake_case_word"),
        ("**a", "**a"),
        ("`` a`b ``", "<code>a`b</code>"),
        ("\\*plain\\*", "<p>*plain*</p>"),
        ("<b>x</b>", "&lt;b&gt;x&lt;/b&gt;"),
        ("a<br>b", "a<br>b"),
        ("[x](ftp://a)", "[x](ftp://a)"),
        ("(see https://a.example/b).", ">https://a.example/b</a>)."),
        ("7. seven", '<ol start="7">'),
        ("- [ ] a\n- b", "<ul><li>[ ] a</li><li>b</li></ul>"),
        ("a\n# b", "<p>a</p><h3"),
        ("| a |\nno table", "<p>| a |"),
    ],
)
def test_forms_of_markdown(modules: Page, text: str, part: str) -> None:
    assert part in render(modules, text, [])


def test_hostile_files_are_refused_or_rebuilt(modules: Page) -> None:
    node = {"role": "user", "content": "hi", "children": ["1"], "chosen": "1", "__proto__x": 1}
    loop = {"root": {"children": ["1"]}, "nodes": {"1": node}}
    cases = {
        "nonsense": "no json",
        "other": json.dumps({"format": "other"}),
        "loop": json.dumps({"format": "qnext-conversations", "version": 1, "conversations": [loop]}),
    }
    for name, text in cases.items():
        message = modules.evaluate(
            """async (text) => {
              const { importText } = await import("/page/exchange.js");
              try { importText(text); return ""; } catch (error) { return error.message; }
            }""",
            text,
        )
        assert message.endswith("."), name


def test_a_deep_conversation_comes_back(modules: Page) -> None:
    """Ten thousand messages one below the other: no recursion breaks."""
    found = modules.evaluate(
        """async () => {
          const { addNode, newConversation, path } = await import("/page/tree.js");
          const { exportText, importText } = await import("/page/exchange.js");
          const made = newConversation();
          let parent = null;
          for (let i = 0; i < 10000; i++) parent = addNode(made, parent, { role: "user", content: String(i) }).id;
          const [back] = importText(exportText([made]));
          return [path(back).length, path(back).at(-1).content, back.id !== made.id];
        }"""
    )
    assert found == [10_000, "9999", True]
