"""The rules that a machine can hold: who imports whom, no torch where none belongs, no pickle, the verbs."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from qnext.cli import VERBS
from tests.house import debts
from tests.house.exceptions import EXCEPTIONS
from tests.house.rules import RULES, in_circles, num_parameters, reads_past_a_module
from tests.house.source import (
    PACKAGE,
    ROOT,
    folder_of,
    functions_of,
    imports_of,
    last_word,
    modules,
    nodes,
    types_of,
)
from tests.longest import LONGEST
from tests.pace import slowness

# What all may import, beside qnext itself (the version).
EVERYWHERE = {"errors", "openmp", "version", "confined", "files", "interrupts", "lazy", "collecting"}
# folder -> what else it may import
MAY_IMPORT: dict[str, set[str]] = {
    "confined": set(),
    "files": set(),
    "config": set(),
    "ops": set(),
    "text": set(),
    "planning": {"config"},
    "model": {"config", "planning", "ops"},
    "quant": {"config", "planning", "ops", "model"},
    "residency": {"planning", "ops"},
    "lora": {"config", "planning", "ops", "model"},
    "probe": {"config", "ops", "model"},
    "parallel": {"config", "planning", "ops", "model"},
    "engine": {"config", "planning", "ops", "model", "residency", "probe"},
    "checkpoint": {"config", "planning", "ops", "text", "model", "quant", "residency", "lora", "parallel"},
    "eval": {"config", "text", "model", "quant", "engine"},
    "server": {"planning", "engine", "text"},
    "training": {"config", "planning", "text", "ops", "model", "lora", "checkpoint", "eval"},
}
MAY_IMPORT["session"] = set(MAY_IMPORT) - {"training"}
MAY_IMPORT["client"] = {"text", "session"}
MAY_IMPORT["bench"] = MAY_IMPORT["diagnostics"] = MAY_IMPORT["session"] | {"session"}
MAY_IMPORT["harness"] = MAY_IMPORT["session"] | {"session"}
MAY_IMPORT["recipes"] = set(MAY_IMPORT) - {"client", "bench", "diagnostics"}
MAY_IMPORT["claims"] = set(MAY_IMPORT) - {"client"}
MAY_IMPORT["replicas"] = {"server"}
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"replicas"}

WITHOUT_TORCH = ["confined", "files", "config", "text", "planning", "client"]
MODULES_WITHOUT_TORCH = [
    "qnext.errors",
    "qnext.cli",
    "qnext.engine.metrics",
    "qnext.engine.sampling.seeds",
    "qnext.engine.sampling.constraint",
    "qnext.session.talk",
    "qnext.server.access.keys",
    "qnext.server.access.rates",
    "qnext.server.access.audit",
    "qnext.server.access.audit_reading",
    "qnext.server.metrics",
    "qnext.replicas.prefixes",
    "qnext.replicas.figures",
]


@pytest.mark.parametrize("folder", sorted({path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}))
def test_a_folder_imports_only_what_stands_below_it(folder: str) -> None:
    assert folder in MAY_IMPORT, f"qnext/{folder} has no place in the house: see docs/architecture.md"
    allowed = MAY_IMPORT[folder] | {folder, "", *EVERYWHERE}
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        if folder_of(name) == folder
        for target in imports_of(name)
        if target.split(".")[0] == "qnext" and folder_of(target) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_between_folders() -> None:
    """The table above is itself a way up: it can be sorted."""
    placed: list[str] = []
    while len(placed) < len(MAY_IMPORT):
        ready = [
            f for f, below in MAY_IMPORT.items() if f not in placed and below - {f, "cli", "recipes"} <= set(placed)
        ]
        assert ready, f"a circle among {set(MAY_IMPORT) - set(placed)}"
        placed += ready


def test_the_rule_sees_an_import_inside_a_function() -> None:
    """A known case keeps the parser honest: cli imports typer only when a verb runs."""
    assert "typer" in imports_of("qnext.cli")
    assert "qnext.errors" in imports_of("qnext.cli")
    assert folder_of("qnext.ops.torch.moe") == "ops"


def reaches(name: str) -> set[str]:
    """Everything that a module imports at run time, directly or through other modules of the package."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for target in imports_of(waiting.pop(), with_types=False):
            if target not in seen:
                seen.add(target)
                if target in modules():
                    waiting.append(target)
    return seen


def has_no_torch(name: str) -> bool:
    return folder_of(name) in WITHOUT_TORCH or name.startswith("qnext.engine.policy")


@pytest.mark.parametrize("name", [*MODULES_WITHOUT_TORCH, *filter(has_no_torch, modules())])
def test_policy_and_text_need_no_torch(name: str) -> None:
    if name not in modules():
        pytest.skip(f"{name} does not exist")
    reached = {target.split(".")[0] for target in reaches(name)} if name != "qnext.cli" else set(imports_of(name))
    assert "torch" not in reached
    assert "transformers" not in reached


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_importing_a_light_folder_loads_no_torch(folder: str) -> None:
    names = [name for name in modules() if folder_of(name) == folder and not name.endswith("_worker")]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_package_never_needs_transformers() -> None:
    users = [name for name in modules() if any(t.split(".")[0] == "transformers" for t in imports_of(name))]
    assert not users


# What puts something on a disk or takes it away, and who may call it beside qnext.files, for which reason.
WRITING_CALLS = {
    *(f"os.{name}" for name in ("rename", "replace", "link", "unlink", "remove", "rmdir", "truncate", "ftruncate")),
    *(f"shutil.{name}" for name in ("rmtree", "move", "copyfile", "copy", "copy2", "copytree")),
    *(f"tempfile.{name}" for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory")),
    "save_file",
}
LAST_WORDS = {called.rpartition(".")[2] for called in WRITING_CALLS}
WRITING_METHODS = {"write_text", "write_bytes", "unlink", "rmdir", "rename"}
MAY_WRITE = {
    "qnext.engine.storage.disk_files": "reaches its private folder by a descriptor alone",
    "qnext.server.access.audit": "a log that grows, and whose names move on",
    "qnext.client.batch_files": "the empty file of a run that could not begin",
    "qnext.server.run": "the name of a socket",
}


def test_what_goes_to_disk_goes_through_one_home() -> None:
    """Whole, flushed, and with what a killed run left: see qnext/files. `open` for writing counts too."""
    for name, path in modules().items():
        if folder_of(name) != "files" and name not in MAY_WRITE:
            found = [f"{name}:{call.lineno}: {ast.unparse(call.func)}()" for call in calls_of(path) if writes(call)]
            assert not found, "\n".join(found)


def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in nodes(path)[ast.Call] if isinstance(node, ast.Call)]


def writes(call: ast.Call) -> bool:
    last = last_word(call.func)
    if last in WRITING_METHODS and isinstance(call.func, ast.Attribute):
        return True
    if last != "open":
        return last in LAST_WORDS and ast.unparse(call.func) in WRITING_CALLS
    constants = [
        each for each in [*call.args, *(word.value for word in call.keywords)] if isinstance(each, ast.Constant)
    ]
    modes = [each.value for each in constants if isinstance(each.value, str) and set(each.value) <= set("rwaxbt+")]
    return ast.unparse(call.func) != "os.open" and any(set(mode) & set("wax+") for mode in modes)


def test_whoever_may_write_does() -> None:
    """An exception that nobody needs is taken from the list."""
    for name in MAY_WRITE:
        assert any(writes(call) for call in calls_of(modules()[name])), name


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"}
LAST_WORDS_OF_FORBIDDEN = {called.rpartition(".")[2] for called in FORBIDDEN_CALLS}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


@pytest.mark.parametrize("name", list(modules()))
def test_no_file_can_run_what_it_reads(name: str) -> None:
    """No unpickling and no evaluation of text, whatever a checkpoint or a template holds."""
    for call in calls_of(modules()[name]):
        if last_word(call.func) in LAST_WORDS_OF_FORBIDDEN:
            called = ast.unparse(call.func)
            assert called not in FORBIDDEN_CALLS, f"{name}:{call.lineno}: {called}()"
    roots = {target.split(".")[0] for target in imports_of(name)}
    assert not roots & FORBIDDEN_MODULES


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_a_command(verb: str) -> None:
    module = importlib.import_module("qnext.cli." + verb.replace("-", "_"))
    app = getattr(module, "app", None)
    commands = [module.command] if app is None else [found.callback for found in app.registered_commands]
    assert commands and all(map(callable, commands))
    for command in commands:
        for parameter in inspect.signature(command).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{verb}: {parameter.name} has no type"


def test_every_file_of_the_command_line_is_a_verb() -> None:
    files = {path.stem for path in (PACKAGE / "cli").glob("*.py") if not path.stem.startswith("_")}
    assert files == {verb.replace("-", "_") for verb in VERBS}


def test_files_of_tests_that_go_first_are_there() -> None:
    assert [file for file in LONGEST if not (ROOT / file).is_file()] == []


def test_help_is_quick() -> None:
    """Under 200 ms of a processor: the best of several, since another process may hold the machine."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    best, limit = float("inf"), 0.2 * slowness()
    for _ in range(15):
        start = spent()
        done = subprocess.run([sys.executable, "-m", "qnext", "--help"], cwd=ROOT, capture_output=True, check=True)
        best = min(best, spent() - start)
        if best < limit:
            break
    assert all(verb.encode() in done.stdout for verb in VERBS)
    assert best < limit, f"qnext --help took {best * 1000:.0f} ms, where {limit * 1000:.0f} are allowed"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom qnext.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'typer', 'numpy', 'rich', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wrong_verb_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qnext", "sevre"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "sevre" in done.stderr
    assert "Traceback" not in done.stderr


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def test_every_requirement_is_pinned() -> None:
    """What pyproject.toml asks for, constraints.txt fixes, and inside the range."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert "+" not in exact.version, f"{pin}: a local build is no version of the package"
        assert requirement.specifier.contains(exact.version), f"{pin} is outside {requirement}"


def test_the_oldest_python_can_be_served() -> None:
    """A pin that has no release for Python 3.10 must not bind there, else `make` fails on a machine with 3.10."""
    for pin in pins().values():
        try:
            found = importlib.metadata.metadata(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        binds = pin.marker is None or pin.marker.evaluate({"python_version": "3.10", "python_full_version": "3.10.0"})
        if binds and found["Version"] == next(iter(pin.specifier)).version:
            supported = SpecifierSet(found.get("Requires-Python") or "")
            assert supported.contains("3.10.13"), f"{pin} needs Python {supported}: give it a marker"


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_no_offence_that_is_not_known(rule: str) -> None:
    """What is known lies in tests/house/debts; `python -m tests.house.debts` takes out what was mended."""
    found = debts.problems(rule)
    assert not found, "\n".join([rule, *found])


def test_the_rules_see_what_they_are_to_see(tmp_path: Path) -> None:
    """Each finds an offence in a small package."""
    assert in_circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["d"]}) == ["b", "c", "d"]
    (tmp_path / "one.py").write_text(
        "class A:\n    def long(self, a, b, *, c, **d):\n        def inner(): ...\n        return self.fc.weight\n"
    )
    (outer, node), (inner, _) = functions_of(tmp_path / "one.py")
    assert (outer, inner) == ("A.long", "A.long.inner")
    assert num_parameters(node) == 4
    assert reads_past_a_module(tmp_path / "one.py") == ["self.fc.weight"]
    (tmp_path / "two.py").write_text("Item = TypeVar('Item')\n_Rows = list[int]\nclass B: ...\nMAX = 3\n")
    assert list(types_of(tmp_path / "two.py")) == ["B", "_Rows"]


def test_a_new_offence_cannot_take_the_place_of_a_mended_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are as many as before. An exception has a reason, and goes when it is needed no more."""
    rule, mended, other, more = next(iter(RULES)), "qnext.a.mended", "qnext.a.other", "qnext.a.more"
    monkeypatch.setattr(debts, "RULES", {rule: lambda: {other: 1, more: 2}})
    monkeypatch.setattr(debts, "known", lambda rule: {mended: 1, more: 1})
    found = debts.problems(rule)
    assert [line.partition(":")[0] for line in found] == [mended, more, other]
    with pytest.raises(SystemExit, match=f"{other}: 1, not 0"):
        debts.main()
    monkeypatch.setattr(debts, "EXCEPTIONS", {rule: {other: "as it must be", mended: "no more"}})
    assert [line.partition(":")[0] for line in debts.problems(rule)] == [mended, mended, more]


def test_every_exception_has_a_reason() -> None:
    assert set(EXCEPTIONS) <= set(RULES)
    assert all(len(reason.split()) >= 3 for offences in EXCEPTIONS.values() for reason in offences.values())
