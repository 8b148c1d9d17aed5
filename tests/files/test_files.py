"""Verbs of qnext.files: modes, links, pipes, leftovers of killed and of living runs, and what errors say."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qnext import files
from qnext.errors import DiskFull, DoesNotFit
from qnext.files import folders
from qnext.files.partial import hidden


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_keeps_its_mode_and_a_new_one_gets_the_usual(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    files.write_file(tmp_path / "new", "x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
    (tmp_path / "new").chmod(0o604)
    files.write_file(tmp_path / "new", "y")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604 and (tmp_path / "new").read_text() == "y"
    files.write_file(tmp_path / "private", b"z", mode=0o600)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    files.write_file(tmp_path / "f", "x", mode=0o600)
    os.chown(tmp_path / "f", 1234, 1234)
    files.write_file(tmp_path / "f", "y", mode=0o600)
    found = (tmp_path / "f").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 1234, 0o600)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "f").write_text("old")
    (tmp_path / "link").symlink_to("deep/f")
    files.write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "f").read_text() == "new"
    assert names(tmp_path) == ["deep", "link"] and names(tmp_path / "deep") == ["f"]


def test_a_pipe_and_a_device_are_written_to_and_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    thread.start()
    files.write_file(tmp_path / "pipe", "through")
    thread.join(10)
    assert read == [b"through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    done = subprocess.run(
        [sys.executable, "-c", "from qnext import files; files.write_file('/dev/stdout', 'out')"],
        stdout=subprocess.PIPE,
    )
    assert done.stdout == b"out"
    files.write_file("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(IsADirectoryError):
        files.write_file(tmp_path, "x")
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_ends_a_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), files.new_folder(tmp_path / "new" / "deep" / "d") as folder:
        files.write_inside(folder / "a", "x")
        raise error
    with pytest.raises(error), files.new_file(tmp_path / "f") as file:
        file.write(b"x")
        raise error
    with pytest.raises(error), files.scratch_folder(beside=tmp_path / "s") as folder:
        raise error
    assert names(tmp_path) == []


def killed(code: str, folder: Path) -> None:
    """Run code that kills itself in the middle."""
    program = f"import os, signal, sys\nfrom qnext import files\nroot = sys.argv[1]\n{code}"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=False)
    assert done.returncode == -9


KILL = "    os.kill(os.getpid(), signal.SIGKILL)\n"


def test_what_a_killed_run_left_goes_and_what_a_living_one_makes_stays(tmp_path: Path) -> None:
    killed(f"with files.new_folder(root + '/d') as f:\n    files.write_inside(f / 'a', 'x')\n{KILL}", tmp_path)
    killed(f"with files.new_file(root + '/f') as f:\n    f.write(b'x')\n{KILL}", tmp_path)
    assert len(names(tmp_path)) == 2 and all(files.is_partial(path) for path in tmp_path.iterdir())
    with files.new_folder(tmp_path / "d") as mine:
        assert len(names(tmp_path)) == 2  # the killed one's is gone
        files.remove_partials(tmp_path)
        assert names(tmp_path) == [mine.name]  # locked, though by this very process
    files.write_file(tmp_path / "f", "y")
    assert names(tmp_path) == ["d", "f"]


def test_only_names_of_this_form_are_deleted(tmp_path: Path) -> None:
    kept = [
        ".d.partial-1234",
        "d.partial-0123456789ab",
        ".e.partial-0123456789ab",
        ".d.partial-0123456789AB",
        "d.partial",
    ]
    for name in kept:
        (tmp_path / name).write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "letter").write_text("dear")
    (tmp_path / ".d.partial-abcdefabcdef").symlink_to(outside)
    files.write_file(tmp_path / "d", "x")
    assert names(tmp_path) == sorted([*kept, "d", "outside", ".d.partial-abcdefabcdef"])
    assert (outside / "letter").read_text() == "dear"


def test_long_names(tmp_path: Path) -> None:
    name = "ü" * 127
    files.write_file(tmp_path / name, "x")
    with files.new_folder(tmp_path / ("a" * 255)) as folder:
        files.write_inside(folder / "f", "x")
    other = hidden(tmp_path / ("a" * 254), "partial").name
    assert not hidden(tmp_path / ("a" * 255), "partial").name.startswith(other[:215])
    assert names(tmp_path) == ["a" * 255, name]


def test_without_exchange_the_old_folder_comes_back_with_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    with files.new_folder(tmp_path / "d") as folder:
        files.write_inside(folder / "f", "old")
    (tmp_path / "d").rename(tmp_path / ".d.old-0123456789ab")  # where a kill between the two renames leaves it
    with pytest.raises(ValueError), files.new_folder(tmp_path / "d") as folder:
        assert (tmp_path / "d" / "f").read_text() == "old"
        raise ValueError
    assert names(tmp_path) == ["d"] and (tmp_path / "d" / "f").read_text() == "old"
    with files.new_folder(tmp_path / "d") as folder:
        files.write_inside(folder / "f", "new")
    assert names(tmp_path) == ["d"] and (tmp_path / "d" / "f").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("has_old", [False, True], ids=["new", "replaced"])
def test_an_error_names_the_file_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, has_old: bool
) -> None:
    if has_old:
        files.write_file(tmp_path / "f", "old")
        with files.new_folder(tmp_path / "d") as folder:
            files.write_inside(folder / "a", "old")

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)
    became = "stays as it was" if has_old else "was not made"
    with pytest.raises(OSError) as file_error:
        files.write_file(tmp_path / "f", "new")
    with pytest.raises(OSError) as folder_error, files.new_folder(tmp_path / "d") as folder:
        files.write_inside(folder / "a", "new")
    is_full = number != errno.EIO and number != errno.EROFS
    for caught, place, what in ((file_error, "f", "it"), (folder_error, "d/a", f"{tmp_path}/d")):
        error = caught.value
        assert isinstance(error, DiskFull) == is_full == isinstance(error, DoesNotFit)
        text = str(error) if is_full else f"{error.filename}: {error.strerror}"
        assert text == f"{tmp_path}/{place}: {os.strerror(number)}; {what} {became}"
    assert names(tmp_path) == (["d", "f"] if has_old else [])
    assert not has_old or (tmp_path / "f").read_text() == "old"


def test_an_error_of_a_source_is_not_told_as_one_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, files.new_folder(tmp_path / "d") as folder:
        files.copy_inside(tmp_path / "nowhere", folder / "a")
    assert str(caught.value.filename) == str(tmp_path / "nowhere") and "made" not in str(caught.value)


def test_an_append_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_bytes(b"one\n")
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_APPEND)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:2]))
        with pytest.raises(DiskFull, match=f"^{tmp_path}/log: No space left on device; it stays as it was$"):
            files.append(descriptor, b"two\n", path=tmp_path / "log")
    files.append(descriptor, b"three\n", path=tmp_path / "log")
    os.close(descriptor)
    assert (tmp_path / "log").read_bytes() == b"one\nthree\n"


def test_two_at_once_are_both_whole(tmp_path: Path) -> None:
    with files.new_file(tmp_path / "f") as one, files.new_file(tmp_path / "f") as other:
        one.write(b"one")
        other.write(b"other")
    assert (tmp_path / "f").read_text() == "one" and names(tmp_path) == ["f"]


def test_a_scratch_folder_that_is_replaced_as_a_whole_stays_its_makers(tmp_path: Path) -> None:
    with files.scratch_folder(tmp_path / "some") as made:
        with files.new_folder(made) as whole:
            files.write_inside(whole / "file", "text")
        files.remove_partials(tmp_path)  # as another run does
        assert (made / "file").read_text() == "text"
    assert not list(tmp_path.iterdir())
