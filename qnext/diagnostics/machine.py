"""Findings about the machine and this process: software, processor, kernels, memory, disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qnext.diagnostics.finding import Finding
from qnext.planning import machine
from qnext.planning.machine import format_bytes

_LOW_MEMORY, _LOW_DISK, _LOW_FILES = 2 << 30, 5 << 30, 1024


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


def _software() -> Iterator[Finding]:
    from qnext.version import __version__

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
    cpu = machine.processor()
    features = " ".join(cpu.features) or "no known extension"
    text = f"{cpu.name}, {cpu.num_cores} cores, {cpu.num_usable:g} for this process; {features}"
    data = {"model": cpu.name, "cores": cpu.num_cores, "allowed": cpu.num_allowed, "quota": cpu.quota}
    data["features"] = list(cpu.features)
    if cpu.quota is not None and cpu.quota < cpu.num_allowed:
        advice = f"OMP_NUM_THREADS={max(1, int(cpu.quota))} keeps threads from waiting for the group's share"
        return Finding("processor", "warning", text, advice, data)
    return Finding("processor", "ok", text, data=data)


def _kernels() -> Iterator[Finding]:
    import torch

    from qnext.diagnostics.kernels import self_test
    from qnext.ops.backends import BACKEND_VARIABLE, PACKAGES_VARIABLE, instruction_set

    wanted = os.environ.get(BACKEND_VARIABLE, "")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            isa = instruction_set()
    except (ValueError, ImportError) as error:
        advice = f"unset {BACKEND_VARIABLE} and {PACKAGES_VARIABLE}, or build the native kernels"
        yield Finding("backend", "problem", str(error), advice)
        return
    data = {"backend": "cpu" if isa else "torch", "variable": wanted or None, "threads": torch.get_num_threads()}
    if isa is None and wanted in ("torch", "reference"):
        text = f"{wanted}, as {BACKEND_VARIABLE} says"
        yield Finding("backend", "warning", text, f"unset {BACKEND_VARIABLE} for the faster native kernels", data)
    elif isa is None:
        reason = str(caught[0].message) if caught else "the native kernels are not available"
        yield Finding("backend", "warning", reason, "install a C++20 compiler and reinstall qnext", data)
    else:
        data["instruction_set"] = isa
        yield Finding("backend", "ok", f"native kernels, {isa}, {torch.get_num_threads()} threads", data=data)
        yield self_test()


def _gpu() -> Finding:
    """Whether torch finds a GPU that computes. A build of torch for the CPU sees none; the driver's files do."""
    from qnext.ops import cuda_computes

    devices = _gpus_of_torch() or [{"name": name} for name in machine.gpus_of_drivers()]
    if not devices:
        return Finding("gpu", "ok", "none found; qnext computes on the CPU", data={"devices": [], "is_used": False})
    text = ", ".join(
        each["name"] + (f" ({each['total_bytes'] / 2**30:.0f} GiB)" if "total_bytes" in each else "")
        for each in devices
    )
    is_used = cuda_computes()
    if is_used:
        text += ": computes where the weights of a model fit (--device)"
    else:
        text += ": not used, qnext computes on the CPU; PyTorch for CUDA uses NVIDIA's"
    return Finding("gpu", "ok", text, data={"devices": devices, "is_used": is_used})


def _gpus_of_torch() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"name": properties.name, "total_bytes": properties.total_memory})
    if not devices and torch.backends.mps.is_available():
        devices.append({"name": "Apple GPU"})
    return devices


def _memory() -> Finding:
    free, total, limit = machine.available_bytes(), machine.total_bytes(), machine.group_limit_bytes()
    text = f"{format_bytes(free)} free of {format_bytes(total)}"
    if limit is not None and limit >= total:
        limit = None
    if limit is not None:
        text += f"; the control group allows {format_bytes(limit)}"
    data = {"free_bytes": free, "total_bytes": total, "group_limit_bytes": limit}
    if free < _LOW_MEMORY:
        return Finding("memory", "warning", text, "end other programs: less than 2 GiB hold small models only", data)
    return Finding("memory", "ok", text, data=data)


def _huge_pages(file: Path = machine.HUGE_PAGES) -> Finding:
    """Weights in huge pages are read a third faster; the program asks for them where the system leaves it to it."""
    mode = machine.chosen_mode(file)
    if mode == "never":
        advice = f"`echo madvise > {file}` as root makes reading of weights faster"
        return Finding("huge pages", "warning", mode, advice, {"mode": mode})
    return Finding("huge pages", "ok", mode or "unknown here", data={"mode": mode})


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
