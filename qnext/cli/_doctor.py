"""What `qnext doctor` finds out about the machine. A finding is a line for people and numbers for programs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "warning", "problem"]

_CPU_FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_LOW_MEMORY, _LOW_DISK, _LOW_FILES = 2 << 30, 5 << 30, 1024


class Finding(NamedTuple):
    """`advice` is one line where the status is not ok."""

    name: str
    status: Status
    text: str
    advice: str = ""
    data: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)


def machine_findings() -> Iterator[Finding]:
    """Software, processor, memory, disk: about the machine and this process, whatever the model."""
    yield from _software()
    yield _processor()
    try:
        import torch  # noqa: F401
    except ImportError as error:
        reason = f"torch cannot be imported: {' '.join(str(error).split())}"
        yield Finding("torch", "problem", reason, "README.md says how to install it")
        return
    yield from _kernels()
    yield _gpu()
    yield _memory()
    yield _huge_pages()
    yield from _disks()
    yield _open_files()


def group_limit(name: str, v1_name: str, *, root: Path = Path("/sys/fs/cgroup"), own: Path | None = None) -> str | None:
    """The text of a limit of this process's control group, of the nearest group that has one; version 2 or 1."""
    try:
        lines = (own or Path("/proc/self/cgroup")).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base, file = (root, name)
        if controllers:
            if v1_name.partition(".")[0] not in controllers.split(","):
                continue
            base, file = root / controllers, v1_name
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            if (group / file).is_file():
                text = (group / file).read_text().strip()
                if not text.startswith(("max", "-1")):
                    return text
    return None


def _software() -> Iterator[Finding]:
    from qnext import __version__

    yield Finding(
        "python", "ok", f"{platform.python_version()}, {sys.executable}", data={"version": platform.python_version()}
    )
    place = Path(__file__).parents[1]
    yield Finding("qnext", "ok", f"{__version__}, {place}", data={"version": __version__, "folder": str(place)})
    yield Finding("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    try:
        wanted = importlib.metadata.requires("qnext") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "packages", "warning", "qnext itself is not installed", "`pip install .` lets versions be checked"
        )
        return
    yield _packages(wanted)


def _packages(wanted: list[str]) -> Finding:
    """Versions of what the package requires, against the ranges in its metadata."""
    from packaging.requirements import Requirement

    versions: dict[str, str | None] = {}
    wrong: dict[str, str] = {}
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            versions[requirement.name] = None
            wrong[str(requirement)] = f"{requirement.name} is missing"
            continue
        versions[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            wrong[str(requirement)] = f"{requirement.name} {version} is not {requirement.specifier}"
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if wrong:
        advice = f"pip install {' '.join(map(shlex.quote, wrong))}"
        return Finding("packages", "problem", "; ".join(wrong.values()), advice, versions)
    return Finding("packages", "ok", text, data=versions)


def _processor() -> Finding:
    model, flags = _cpu_info()
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _cpu_quota()
    found = [flag for flag in _CPU_FLAGS if flag in flags]
    usable = min(allowed, quota or allowed)
    text = f"{model}, {cores} cores, {usable:g} for this process; {' '.join(found) or 'no known extension'}"
    data = {"model": model, "cores": cores, "allowed": allowed, "quota": quota, "features": found}
    if quota is not None and quota < allowed:
        advice = f"OMP_NUM_THREADS={max(1, int(quota))} keeps threads from waiting for the group's share"
        return Finding("processor", "warning", text, advice, data)
    return Finding("processor", "ok", text, data=data)


def _cpu_info() -> tuple[str, set[str]]:
    """Name and flags as Linux tells them; elsewhere the name alone."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, set((fields.get("flags") or fields.get("Features") or "").split())


def _cpu_quota() -> float | None:
    """Cores that the control group grants, None where it does not limit them."""
    text = group_limit("cpu.max", "cpu.cfs_quota_us")
    if text is None:
        return None
    quota, *period = text.split()
    whole = period[0] if period else group_limit("cpu.max", "cpu.cfs_period_us") or "100000"
    return int(quota) / int(whole)


def _kernels() -> Iterator[Finding]:
    import torch

    from qnext.cli._doctor_kernels import self_test
    from qnext.ops.backend import BACKEND_VARIABLE, native_module

    wanted = os.environ.get(BACKEND_VARIABLE, "")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            native = native_module()
    except (ValueError, ImportError) as error:
        yield Finding("backend", "problem", str(error), f"unset {BACKEND_VARIABLE}, or build the native kernels")
        return
    data = {"backend": "cpu" if native else "reference", "variable": wanted or None, "threads": torch.get_num_threads()}
    if native is None and wanted == "reference":
        text = f"reference, as {BACKEND_VARIABLE} says"
        yield Finding("backend", "warning", text, f"unset {BACKEND_VARIABLE} for the faster native kernels", data)
    elif native is None:
        reason = str(caught[0].message) if caught else "the native kernels are not available"
        yield Finding("backend", "warning", reason, "install a C++20 compiler and reinstall qnext", data)
    else:
        data["instruction_set"] = native.isa()
        yield Finding("backend", "ok", f"native kernels, {native.isa()}, {torch.get_num_threads()} threads", data=data)
        yield self_test()


def _gpu(drivers: Path = Path("/proc/driver/nvidia/gpus"), kfd: Path = Path("/sys/class/kfd/kfd/topology")) -> Finding:
    """Verbs compute on the CPU, whatever is there. A build of torch for the CPU sees no GPU; the driver's files do."""
    devices = _gpus_of_torch() or _gpus_of_drivers(drivers, kfd)
    if not devices:
        return Finding("gpu", "ok", "none found; qnext computes on the CPU", data={"devices": [], "is_used": False})
    text = ", ".join(
        each["name"] + (f" ({each['total_bytes'] / 2**30:.0f} GiB)" if "total_bytes" in each else "")
        for each in devices
    )
    text += ": not used yet, qnext computes on the CPU"
    return Finding("gpu", "ok", text, data={"devices": devices, "is_used": False})


def _gpus_of_torch() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"name": properties.name, "total_bytes": properties.total_memory})
    if not devices and torch.backends.mps.is_available():
        devices.append({"name": "Apple GPU"})
    return devices


def _gpus_of_drivers(drivers: Path, kfd: Path) -> list[dict[str, Any]]:
    """NVIDIA's driver has a file for each GPU, AMD's a node for each; nodes of processors have no compute units."""
    found: list[dict[str, Any]] = []
    for path, pattern in ((drivers, "*/information"), (kfd, "nodes/*/properties")):
        for file in sorted(path.glob(pattern)):
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            model = re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE)
            units = re.search(r"^simd_count (\d+)", text, re.MULTILINE)
            if model or (units and int(units[1])):
                found.append({"name": model[1] if model else "AMD GPU"})
    return found


def _memory() -> Finding:
    import torch

    from qnext.engine.memory import available_bytes, format_bytes

    free = available_bytes(torch.device("cpu"))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{format_bytes(free)} free of {format_bytes(total)}"
    limit = group_limit("memory.max", "memory.limit_in_bytes")
    limit_bytes = int(limit) if limit is not None and int(limit) < total else None
    if limit_bytes is not None:
        text += f"; the control group allows {format_bytes(limit_bytes)}"
    data = {"free_bytes": free, "total_bytes": total, "group_limit_bytes": limit_bytes}
    if free < _LOW_MEMORY:
        return Finding("memory", "warning", text, "end other programs: less than 2 GiB hold small models only", data)
    return Finding("memory", "ok", text, data=data)


def _huge_pages(folder: Path = Path("/sys/kernel/mm/transparent_hugepage")) -> Finding:
    """Weights in huge pages are read a third faster; the program asks for them where the system leaves it to it."""
    try:
        text = (folder / "enabled").read_text()
    except OSError:
        return Finding("huge pages", "ok", "unknown here", data={"mode": None})
    mode = text.partition("[")[2].partition("]")[0]
    if mode == "never":
        advice = f"`echo madvise > {folder / 'enabled'}` as root makes reading of weights faster"
        return Finding("huge pages", "warning", mode, advice, {"mode": mode})
    return Finding("huge pages", "ok", mode, data={"mode": mode})


def _disks() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    models = len(list(cache.glob("models--*")))
    yield _disk("disk", Path.cwd(), f"in {Path.cwd()}", {})
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    data = {"folder": str(cache), "models": models}
    if not os.access(existing, os.W_OK):
        yield Finding(
            "model cache", "warning", f"{cache} cannot be written", "set HF_HOME to a folder that can be", data
        )
    else:
        yield _disk("model cache", existing, f"for {cache}, {models} models", data)


def _disk(name: str, folder: Path, text: str, data: dict[str, Any]) -> Finding:
    from qnext.engine.memory import format_bytes

    free = shutil.disk_usage(folder).free
    text, data = f"{format_bytes(free)} free {text}", {**data, "free_bytes": free}
    if free < _LOW_DISK:
        return Finding(
            name, "warning", text, "make room: a checkpoint needs its size, a quantised copy a quarter more", data
        )
    return Finding(name, "ok", text, data=data)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,} at once"
    data = {"soft": soft, "hard": hard}
    if soft != resource.RLIM_INFINITY and soft < _LOW_FILES:
        return Finding("open files", "warning", text, "`ulimit -n 65536`: a server holds one for each connection", data)
    return Finding("open files", "ok", text, data=data)
