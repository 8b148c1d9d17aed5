"""What the machine has, and what control groups of both versions leave of it."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from qnext.planning import machine
from qnext.planning.machine import ControlGroups, available_bytes, group_limit_bytes, peak_bytes, processor


@pytest.fixture
def groups(tmp_path: Path) -> ControlGroups:
    return ControlGroups(tmp_path / "groups", tmp_path / "membership")


def write(folder: Path, **files: str) -> None:
    """`memory_max="1000"` is the file memory.max."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")


def test_memory_of_groups_of_version_2(groups: ControlGroups) -> None:
    stat = "anon 5\ninactive_file 100"
    write(groups.root / "a/b", memory_max="max", memory_current="70", memory_stat=stat)
    write(groups.root / "a", memory_max="1000", memory_current="600", memory_stat=stat)
    groups.membership.write_text("0::/a/b\n")
    assert (group_limit_bytes(groups), available_bytes(groups)) == (1000, 500)
    write(groups.root / "a/b", memory_max="400", memory_current="390", memory_stat=stat)
    assert (group_limit_bytes(groups), available_bytes(groups)) == (400, 110)


def test_memory_of_groups_of_version_1(groups: ControlGroups) -> None:
    """Each controller has a folder of its own; the group of a container may be mounted as its root."""
    stat = "inactive_file 1\ntotal_inactive_file 200"
    write(groups.root / "memory", memory_limit_in_bytes="9223372036854771712")
    write(groups.root / "memory/job", memory_limit_in_bytes="1024", memory_usage_in_bytes="1000", memory_stat=stat)
    groups.membership.write_text("4:memory:/job\n2:cpu,cpuacct:/\n0::/\n")
    assert (group_limit_bytes(groups), available_bytes(groups)) == (1024, 224)
    groups.membership.write_text("4:memory:/host/path\n")
    assert group_limit_bytes(groups) is None
    write(groups.root / "memory", memory_limit_in_bytes="2048", memory_usage_in_bytes="2048", memory_stat=stat)
    assert (group_limit_bytes(groups), available_bytes(groups)) == (2048, 200)


def test_no_groups(groups: ControlGroups) -> None:
    assert group_limit_bytes(groups) is None
    assert available_bytes(groups) > 1 << 20
    assert processor(groups=groups).quota is None


def test_shares_of_the_processor(groups: ControlGroups) -> None:
    write(groups.root / "a/b", cpu_max="max 100000")
    write(groups.root / "a", cpu_max="150000 100000")
    groups.membership.write_text("0::/a/b\n")
    assert processor(groups=groups).quota == 1.5
    write(groups.root / "cpu,cpuacct/job", cpu_cfs_quota_us="50000", cpu_cfs_period_us="100000")
    write(groups.root / "cpu,cpuacct", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    groups.membership.write_text("2:cpu,cpuacct:/job\n")
    found = processor(groups=groups)
    assert found.quota == found.num_usable == 0.5
    groups.membership.write_text("2:cpu,cpuacct:/\n")
    assert processor(groups=groups).quota is None


@pytest.mark.parametrize(
    ("text", "name", "generation", "features"),
    [
        ("processor\t: 0\nmodel name\t: A chip\nflags\t\t: fpu avx2 f16c\n", "A chip", "", ("avx2", "f16c")),
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: A chip\n", "A chip", "family 26, model 2", ()),
        ("Features\t: fp asimd sve\n", None, "", ("asimd", "sve")),
        ("", None, "", ()),
    ],
)
def test_what_a_processor_is(
    tmp_path: Path, text: str, name: str | None, generation: str, features: tuple[str, ...]
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    found = processor(tmp_path / "cpuinfo")
    assert name is None or found.name == name
    assert (found.generation, found.features) == (generation, features)
    assert 1 <= found.num_allowed <= found.num_cores


def test_the_most_memory_so_far() -> None:
    before = peak_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_bytes() >= before
    assert peak_bytes() > 64 << 20


def test_examples() -> None:
    assert doctest.testmod(machine) == (0, 1)
