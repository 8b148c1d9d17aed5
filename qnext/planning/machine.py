"""Facts about the machine: processor, memory, disk pages, and what control groups leave of them to this process.

No other code asks for them. They are read anew each time, because limits and free memory change while a program runs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Decide which kernels run, under the names of /proc/cpuinfo (x86-64 and ARM).
_KERNEL_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve"),
)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_UNLIMITED = 1 << 60  # version 1 writes the largest number of pages where there is no limit


class ControlGroups(NamedTuple):
    """Where Linux mounts control groups, and the file that names the groups of this process."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def around(self, controller: str) -> Iterator[tuple[Path, bool]]:
        """(folder, whether it is of version 2) of each group that limits this process, innermost group first."""
        try:
            lines = self.membership.read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            base = self.root / controllers  # version 2 names no controllers
            folder = base / path.lstrip("/")
            for group in (folder, *folder.parents):
                if not group.is_relative_to(base):
                    break
                yield group, not controllers


_GROUPS = ControlGroups()


@dataclass(frozen=True)
class Processor:
    """`num_cores` counts the cores of the machine, `num_allowed` those that this process may use. `quota` is the number
    of cores that its control group grants, None without a limit. `features` are the extensions that decide which
    kernels run. `generation` tells chips of one name apart; it is empty where the system does not say it."""

    name: str
    num_cores: int
    num_allowed: int
    quota: float | None
    features: tuple[str, ...]
    generation: str = ""

    @property
    def num_usable(self) -> float:
        return min(self.num_allowed, self.quota or self.num_allowed)


def processor(file: Path = Path("/proc/cpuinfo"), groups: ControlGroups = _GROUPS) -> Processor:
    """The processor as Linux describes it. On other systems only its name and cores."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in file.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Processor(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        num_cores=os.cpu_count() or 1,
        num_allowed=num_allowed_cores(),
        quota=_processor_quota(groups),
        features=tuple(name for name in _KERNEL_FEATURES if name in flags),
        generation=f"family {fields['cpu family']}, model {fields.get('model', '?')}" if "cpu family" in fields else "",
    )


def num_allowed_cores() -> int:
    """Cores that this process may run on, by its affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_quota(groups: ControlGroups) -> float | None:
    """Cores that the tightest control group grants."""
    found = []
    for folder, is_second in groups.around("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if is_second:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                found.append(int(quota) / int(period))
    return min(found, default=None)


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Of the processor's largest cache; 0 where the system does not say."""
    found = [0]
    for file in folder.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text().strip()
            found.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return max(found)


def total_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes(groups: ControlGroups = _GROUPS) -> int:
    """Host memory that this process can take now. File cache that the system can reclaim is included."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = total_bytes() // 2
    return max(0, min([free, *_group_room(groups)]))


def _group_room(groups: ControlGroups) -> list[int]:
    """Bytes that each memory limit around this process leaves; the pages of files that can be dropped count as free."""
    found = []
    for folder, is_second, limit in _memory_limits(groups):
        with contextlib.suppress(OSError, ValueError):
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / ("memory.current" if is_second else "memory.usage_in_bytes")).read_text())
            found.append(limit - used + int(stat.get("inactive_file" if is_second else "total_inactive_file", 0)))
    return found


def group_limit_bytes(groups: ControlGroups = _GROUPS) -> int | None:
    """The smallest memory limit of the control groups of this process; None without one."""
    return min((limit for _, _, limit in _memory_limits(groups)), default=None)


def _memory_limits(groups: ControlGroups) -> Iterator[tuple[Path, bool, int]]:
    for folder, is_second in groups.around("memory"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limit = int((folder / ("memory.max" if is_second else "memory.limit_in_bytes")).read_text())
            if limit < _UNLIMITED:
                yield folder, is_second, limit


def peak_bytes() -> int:
    """The most memory that this process has held so far, mapped files included."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def chosen_mode(file: Path) -> str | None:
    """The word in brackets of a file such as HUGE_PAGES; None where there is no such word."""
    try:
        return file.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return None


def gpus_of_drivers(
    nvidia: Path = Path("/proc/driver/nvidia/gpus"), amd: Path = Path("/sys/class/kfd/kfd/topology")
) -> list[str]:
    """Names of the GPUs that a driver knows, whether torch can use them or not.

    NVIDIA's driver has a file for each GPU, AMD's a node for each. Nodes of processors have no compute units.
    """
    found: list[str] = []
    for path, pattern in ((nvidia, "*/information"), (amd, "nodes/*/properties")):
        for file in sorted(path.glob(pattern)):
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            model = re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE)
            units = re.search(r"^simd_count (\d+)", text, re.MULTILINE)
            if model or (units and int(units[1])):
                found.append(model[1] if model else "AMD GPU")
    return found


def format_bytes(count: int) -> str:
    """
    >>> format_bytes(75_497_472)
    '72.0 MiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
