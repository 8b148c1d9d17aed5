"""Child process that renders chat templates, run as a file by `qnext.text.jinja`.

Jinja's sandbox stops escapes, not endless loops or huge strings. Here they end this process only.

Requests: `{"context": {...}}` for a rendering, `{"names": true}` for the names that the template reads.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from qnext.confined.child import AnswerRequest, serve


class RaisedByTemplate(Exception):
    """The template itself called `raise_exception`: it does not accept this conversation."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what a training mask counts; for the text it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is fixed by jinja2

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja's own filter, as chat templates expect it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> NoReturn:
    raise RaisedByTemplate(message)


def strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def render(template: jinja2.Template, context: dict[str, Any], max_characters: int) -> dict[str, str]:
    """One answer: `{"text": ...}` or `{"fault": kind, "message": ...}`."""
    parts: list[str] = []
    num_characters = 0
    try:
        for part in template.generate(**context):
            num_characters += len(part)
            if num_characters > max_characters:
                return {"fault": "output", "message": f"more than {max_characters} characters of output"}
            parts.append(part)
    except RaisedByTemplate as error:
        return {"fault": "refusal", "message": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # whatever a foreign template can raise
        return {"fault": "template", "message": f"{type(error).__name__}: {error}"}
    return {"text": "".join(parts)}


def names_read(environment: jinja2.Environment, source: str) -> dict[str, Any]:
    """`{"names": [...]}`: the variables that a template reads from its caller; or a fault."""
    try:
        tree = environment.parse(source)
        names = jinja2.meta.find_undeclared_variables(tree) - set(environment.globals) - own_variables(tree)
    except MemoryError:
        raise
    except Exception as error:  # whatever a foreign template can raise
        return {"fault": "template", "message": f"{type(error).__name__}: {error}"}
    return {"names": sorted(names)}


def own_variables(tree: jinja2.nodes.Template) -> set[str]:
    """Names to which the template gives values of its own, and not only a default where the caller gave none."""
    found: set[str] = set()
    waiting: list[tuple[jinja2.nodes.Node, frozenset[str]]] = [(tree, frozenset())]
    while waiting:
        node, guarded = waiting.pop()
        if isinstance(node, jinja2.nodes.If):
            tests = node.test.find_all(jinja2.nodes.Test)
            guarded |= {
                test.node.name
                for test in [node.test, *tests]
                if isinstance(test, jinja2.nodes.Test) and isinstance(test.node, jinja2.nodes.Name)
            }
        elif isinstance(node, jinja2.nodes.Assign) and isinstance(node.target, jinja2.nodes.Name):
            values = (node.node, *node.node.find_all(jinja2.nodes.Name))
            sources = {value.name for value in values if isinstance(value, jinja2.nodes.Name)}
            if node.target.name not in guarded | sources:
                found.add(node.target.name)
        waiting.extend((child, guarded) for child in node.iter_child_nodes())
    return found


def begin(setup: dict[str, Any]) -> AnswerRequest:
    source, max_characters = setup["source"], setup["output_characters"]
    environment = make_environment()
    template: jinja2.Template | None = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal template
        if "names" in request:
            return names_read(environment, source)
        try:
            # Compiling folds constants, so it is as dangerous as rendering and happens under the same limits.
            template = template or environment.from_string(source)
        except MemoryError:
            raise
        except Exception as error:
            return {"fault": "template", "message": f"{type(error).__name__}: {error}"}
        return render(template, request["context"], max_characters)

    return answer


if __name__ == "__main__":
    serve(begin)
