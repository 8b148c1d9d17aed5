"""The files of the package, and what they import."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qnext"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Of qnext, by their full names."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def outsiders() -> dict[str, Path]:
    """Files of tests and benchmarks, by the names that they would have as modules."""
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    return {module_name(path): path for path in sorted(paths)}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> Mapping[type[ast.AST], list[ast.AST]]:
    """Of the tree, by their kind: so that one walk serves all rules."""
    found: dict[type[ast.AST], list[ast.AST]] = defaultdict(list)
    for node in ast.walk(tree(path)):
        found[type(node)].append(node)
    return found


def folder_of(name: str) -> str:
    """The folder of qnext in which a module lies; "" for a file beside the folders."""
    return name.split(".")[1] if name.count(".") else ""


def runs_only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and last_word(node.test) == "TYPE_CHECKING"


def last_word(node: ast.AST) -> str:
    """Of a name or an attribute; "" of anything else. To write a node out takes a hundred times as long."""
    return getattr(node, "attr", getattr(node, "id", ""))


def imports_in(path: Path, *, with_types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """All of a file; where types do not count, without what stands under `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not isinstance(node, ast.expr) and (with_types or not runs_only_for_types(node)):
            waiting += ast.iter_child_nodes(node)


@cache
def imports_of(name: str, *, with_types: bool = True) -> frozenset[str]:
    """Full names of the modules that a file imports, anywhere in it: also inside functions."""
    path = modules().get(name) or outsiders()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in imports_in(path, with_types=with_types):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        else:
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            target = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = f"{target}.{alias.name}"
                found.add(whole if whole in modules() else target)
    return frozenset(found)


@cache
def functions_of(path: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a file with its name in the classes and functions around it."""

    def inner(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue
            name = f"{prefix}{child.name}." if isinstance(child, _NAMED) else prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + child.name, child
            yield from inner(child, name)

    return list(inner(tree(path), ""))


def types_of(path: Path) -> Iterator[str]:
    """Names of the classes of a file, and of the types that it gives a name at its top. A TypeVar is none."""
    yield from (node.name for node in nodes(path)[ast.ClassDef] if isinstance(node, ast.ClassDef))
    for node in tree(path).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and re.fullmatch("_*[A-Z][a-z][A-Za-z]*", target.id):
            value = getattr(node, "value", None)
            if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("TypeVar")):
                yield target.id


_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
