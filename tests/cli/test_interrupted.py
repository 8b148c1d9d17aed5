"""Signals while a verb runs, at every step that it makes on disk: the exit code, one line, and nothing half-made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qnext import interrupts
from qnext.checkpoint import create_folder
from qnext.diagnostics.folder import examine
from qnext.interrupts import Ending, Terminated, held
from qnext.text.train import byte_level_tokenizer, save_tokenizer

from .command import QUANTIZABLE, Capture, run

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir")


class Steps:
    """Sends this process a signal just before the step number `at` that changes something below `root`."""

    def __init__(self) -> None:
        self.root: Path | None = None
        self.count = 0
        self.at = 0
        self.number = signal.SIGTERM
        sys.addaudithook(self._see)

    def arm(self, root: Path, at: int, number: signal.Signals) -> None:
        self.root, self.count, self.at, self.number = root, 0, at, number

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None or (event != "open" and event not in _EVENTS):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        if not isinstance(arguments[0], (str, Path)) or not str(arguments[0]).startswith(str(self.root)):
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps()


@pytest.fixture(autouse=True)
def _disarmed(steps: Steps) -> Iterator[None]:
    yield
    steps.root = None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(QUANTIZABLE.with_layers(4), linear_value_head_dim=QUANTIZABLE.linear_key_head_dim)
    folder = tmp_path_factory.mktemp("models")
    save_tokenizer(byte_level_tokenizer(), folder / "tokenizer", model_max_length=128)
    create_folder(config, folder / "m", seed=1, tokenizer_folder=folder / "tokenizer")
    return folder / "m"


VERBS = {
    "init": "init nano-5m ROOT/out --layers 4 --experts 4 --experts-per-token 1 --vocab-size 400",
    "quantize": "quantize MODEL ROOT/out --scheme int4-g32",
    "convert": "convert MODEL ROOT/out.gguf",
    "import": "convert GGUF ROOT/out",
    "logits": "logits MODEL --tokens 1,2,3 --out ROOT/out.npy",
    "picture": "experts MODEL text --picture ROOT/out.svg",
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_at_every_step(
    verb: str, steps: Steps, source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = VERBS[verb].replace("MODEL", str(source))
    if "GGUF" in words:
        run(capsys, "convert", source, tmp_path / "in.gguf")
        words = words.replace("GGUF", str(tmp_path / "in.gguf"))
    before = set(os.listdir(tmp_path))
    sizes: dict[str, int] = {}
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for at in range(1, 100):
        root = tmp_path / "root"
        root.mkdir()
        number = numbers[at % 3]
        steps.arm(tmp_path, at, number)
        result = run(capsys, *words.replace("ROOT", str(root)).split())
        steps.root = None
        left = sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))
        if steps.count < at:
            assert result.code == 0, result.err
            break
        if result.code == 0:  # it came when nothing was left but to clean up
            assert left
        else:
            assert result.code == 128 + number, (at, result.err)
            assert result.err.splitlines()[-1] == ("interrupted" if number == signal.SIGINT else "terminated")
        assert "Traceback" not in result.err
        assert set(os.listdir(tmp_path)) - before <= {"root"}, at
        assert [name for name in left if name.startswith(".") or "partial" in name] == [], at
        if left == ["out"]:  # it came after the folder got its name
            assert examine(root / "out").problems == [], at
        elif left:
            assert (root / left[0]).stat().st_size == sizes.setdefault(left[0], (root / left[0]).stat().st_size)
        shutil.rmtree(root)
    assert at > 1, "no step was seen"


def test_the_handlers_of_a_caller_come_back(capsys: Capture) -> None:
    before = [signal.getsignal(number) for number in interrupts.ENDING_SIGNALS]
    run(capsys, "--version")
    assert [signal.getsignal(number) for number in interrupts.ENDING_SIGNALS] == before


@pytest.fixture
def ending() -> Iterator[Ending]:
    found = Ending()
    found.begin()
    yield found
    found.end(is_last=False)


def test_what_is_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    found = Ending()
    found.begin()
    try:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        found.end(is_last=False)
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_that_a_destructor_swallows_is_raised_again(ending: Ending) -> None:
    class Noisy:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def use() -> None:
        thing = Noisy()
        del thing
        time.sleep(1)
        pytest.fail("went on")

    with pytest.raises(Terminated) as caught:
        use()
    assert caught.value.code == 143


def test_a_signal_waits_for_an_import(ending: Ending, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised inside torch's import it would abort the process."""
    text = "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.1)\nIS_WHOLE = True\n"
    (tmp_path / "slow_to_import.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def use() -> None:
        import slow_to_import  # type: ignore[import-not-found]

        assert slow_to_import.IS_WHOLE
        time.sleep(1)
        pytest.fail("went on")

    with pytest.raises(Terminated):
        use()
    assert sys.modules["slow_to_import"].IS_WHOLE


def test_held_signals_wait(ending: Ending) -> None:
    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with held():
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "the next one ends the process"


def _ended(code: str, *sent: signal.Signals, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process that says `ready`, is sent signals, and ends."""
    start = "import sys, time\nfrom qnext.cli import main\nimport qnext.cli as cli\n"
    child = subprocess.Popen(
        [sys.executable, "-c", start + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert child.stdout is not None
    for number in sent:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
    out, err = child.communicate(timeout=60)
    return subprocess.CompletedProcess([], child.returncode, out, err)


def test_a_second_signal_ends_at_once() -> None:
    code = """
def verb(arguments):
    try:
        print("ready", flush=True); time.sleep(60)
    finally:
        print("ready", flush=True); time.sleep(60)
cli._dispatch = verb
main()
"""
    done = _ended(code, signal.SIGINT, signal.SIGTERM)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_a_signal_after_the_work_is_silent() -> None:
    code = """
import threading
def verb(arguments):
    threading.Thread(target=lambda: (time.sleep(0.2), print("ready", flush=True), time.sleep(60))).start()
    return 0
cli._dispatch = verb
main()
"""
    done = _ended(code, signal.SIGINT)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def _shell(command: str) -> subprocess.CompletedProcess[str]:
    command = command.replace("qnext", f"{sys.executable} -m qnext")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("qnext --help | true; echo ${PIPESTATUS[0]}", (0, 141), ""),
        ("qnext inspect nano-5m | true; echo ${PIPESTATUS[0]}", (0, 1, 141), ""),
        ("qnext inspect nano-5m --json > /dev/full; echo $?", (4,), "No space left on device"),
        ("qnext --help > /dev/full; echo $?", (4,), "qnext: standard output: No space left on device"),
        ("PYTHONUNBUFFERED=1 qnext inspect nano-5m > /dev/full; echo $?", (4,), "No space left on device"),
        ("qnext inspect nano-5m >&-; echo $?", (0,), ""),
        ("qnext inspect no-such <&- >&- 2>&-; echo $?", (3,), ""),
    ],
)
def test_a_stdout_that_takes_nothing(command: str, code: tuple[int, ...], error: str) -> None:
    done = _shell(command)
    assert int(done.stdout.split()[-1]) in code, done
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert error in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_any_time(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    """From our first line on, also while torch is imported."""
    code = "from qnext.cli import main; import sys; print('ready', file=sys.stderr, flush=True); main()"
    for delay in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5):
        words = ["quantize", str(source), str(tmp_path / "out"), "--scheme", "int4-g32"]
        child = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        assert child.stderr.readline() == "ready\n"
        time.sleep(0.02 + delay)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
        assert child.returncode in (0, 128 + number, -number), (delay, err)
        assert "Traceback" not in err
        assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == []
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
