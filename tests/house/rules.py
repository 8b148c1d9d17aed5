"""What is against a rule of the house. Each rule gives its offences: which one it is, and how often it is there."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tests.house.source import ROOT, functions_of, imports_of, last_word, modules, nodes, outsiders, tree, types_of

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 10
MAX_DOCSTRING_LINES = 8
# Folders in which a parameter of a module is the module's own affair: whoever needs it calls the module.
CALLS_MODULES = ("model", "engine", "training", "eval", "parallel", "residency")

Offences = dict[str, int]


def files_in_a_circle() -> Offences:
    """Files that import themselves by way of others; imports inside functions and for types count."""
    return dict.fromkeys(in_circles({name: imports_of(name) & modules().keys() for name in modules()}), 1)


def rooms_in_a_knot() -> Offences:
    """Of the files and folders within one folder, those that need each other in a circle."""
    found: Offences = {}
    for folder in (name for name, path in modules().items() if path.name == "__init__.py"):
        rooms = {name: room for name in modules() if (room := _room(folder, name))}
        needs: dict[str, set[str]] = {room: set() for room in rooms.values()}
        for name, room in rooms.items():
            needs[room] |= {rooms[target] for target in imports_of(name) if target in rooms} - {room}
        found |= dict.fromkeys(in_circles(needs), 1)
    return found


def long_files() -> Offences:
    return {name: 1 for name, path in modules().items() if len(_text(path).splitlines()) > MAX_FILE_LINES}


def long_functions() -> Offences:
    return {
        f"{name}.{called}": 1
        for name, path in modules().items()
        for called, node in functions_of(path)
        if (node.end_lineno or 0) - (node.body[0] if is_gpu_program(node) else node).lineno + 1 > MAX_FUNCTION_LINES
    }


def functions_of_many_parameters() -> Offences:
    return {
        f"{name}.{called}": 1
        for name, path in modules().items()
        for called, node in functions_of(path)
        if num_parameters(node) > MAX_PARAMETERS and not is_gpu_program(node)
    }


def long_docstrings() -> Offences:
    found: Offences = {}
    for name, path in {**modules(), **outsiders()}.items():
        classes = ((node.name, node) for node in nodes(path)[ast.ClassDef] if isinstance(node, ast.ClassDef))
        places: list[tuple[str, ast.AST]] = [("", tree(path)), *classes, *functions_of(path)]
        for called, node in places:
            text = ast.get_docstring(node)  # type: ignore[arg-type]
            if text and len(text.splitlines()) > MAX_DOCSTRING_LINES:
                found[f"{name}.{called}".rstrip(".")] = 1
    return found


def lines_kept_from_the_formatter() -> Offences:
    mark = re.compile(r"#\s*fmt:\s*(skip|off)")
    return Counter(
        f"{name}: {line.strip()[:60]}"
        for name, path in {**modules(), **outsiders()}.items()
        for line in _text(path).splitlines()
        if mark.search(line)
    )


def private_modules_from_elsewhere() -> Offences:
    """`qnext.a._b` belongs to `qnext.a`: who imports it from another folder, from tests or from benchmarks."""
    found: Offences = {}
    for name in [*modules(), *outsiders()]:
        for target in imports_of(name):
            home = re.match(r"(qnext(?:\.[^_.][^.]*)*)\._", target)
            if home and "__" not in target and not f"{name}.".startswith(f"{home[1]}."):
                found[f"{name} imports {target}"] = 1
    return found


def weights_read_past_their_module() -> Offences:
    """`layer.fc.weight` where `layer.fc(x)` is meant: a module in its place, with LoRA or of a shard, is passed by."""
    return Counter(
        f"{name}: {read}"
        for name, path in modules().items()
        if f"{name}.".split(".")[1] in CALLS_MODULES
        for read in reads_past_a_module(path)
    )


def type_names_of_two_meanings() -> Offences:
    """A class or a named type has its name alone. `_Name` counts as `Name`, and both may stand in one file."""
    found: dict[str, dict[str, str]] = defaultdict(dict)  # name -> module -> as it stands there
    for name, path in modules().items():
        for called in types_of(path):
            found[called.lstrip("_")].setdefault(name, f"{name}.{called}")
    pairs = [(first, other) for first, *others in map(dict.values, found.values()) for other in others]
    return {f"{other} is also {first}": 1 for first, other in pairs}


RULES: Mapping[str, Callable[[], Offences]] = {
    rule.__name__.replace("_", " "): rule
    for rule in (
        files_in_a_circle,
        rooms_in_a_knot,
        long_files,
        long_functions,
        functions_of_many_parameters,
        long_docstrings,
        lines_kept_from_the_formatter,
        private_modules_from_elsewhere,
        weights_read_past_their_module,
        type_names_of_two_meanings,
    )
}


def home_of(offence: str) -> str:
    """The folder whose people mend it: `engine`, `tests.engine`, `benchmarks`."""
    parts = re.split("[ :]", offence)[0].split(".")
    if parts[0] == "benchmarks":
        return "benchmarks"
    inner = len(parts) > 2 or (ROOT / "/".join(parts[:2])).is_dir()
    home = parts[1] if inner and len(parts) > 1 else "beside"
    return home if parts[0] == "qnext" else f"tests.{home}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def in_circles(needs: Mapping[str, Iterable[str]]) -> list[str]:
    found = []
    for name in needs:
        seen: set[str] = set()
        waiting = list(needs[name])
        while waiting and name not in seen:
            target = waiting.pop()
            if target not in seen:
                seen.add(target)
                waiting += needs[target]
        if name in seen:
            found.append(name)
    return found


def _room(folder: str, name: str) -> str:
    """The file or folder directly within `folder` to which a module belongs."""
    inner = name.removeprefix(f"{folder}.")
    return f"{folder}.{inner.split('.')[0]}" if inner != name else ""


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = node.args
    names = [each.arg for each in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")]) + sum(map(bool, (given.vararg, given.kwarg)))


def is_gpu_program(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles the function: addresses, strides and sizes are given to it one by one."""
    return any(ast.unparse(each) == "triton.jit" for each in node.decorator_list)


def reads_past_a_module(path: Path) -> list[str]:
    """Reads of a parameter of a module that is itself an attribute, or has a name that says so."""
    return [
        ast.unparse(node)
        for node in nodes(path)[ast.Attribute]
        if isinstance(node, ast.Attribute)
        and node.attr in ("weight", "bias", "gate_up_proj", "down_proj")
        and (isinstance(node.value, (ast.Attribute, ast.Subscript)) or last_word(node.value) in ("layer", "module"))
    ]
