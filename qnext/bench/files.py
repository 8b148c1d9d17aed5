"""The files that `bench` compares: quantised folders and GGUF files, made once from the model folder and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from qnext.checkpoint.header import CheckpointIndex, index_of
from qnext.errors import QnextError, UsageError
from qnext.files import move_file, scratch_folder
from qnext.quant.scheme import SCHEMES

# scheme -> dtype of torch; the others are quantised folders
FLOAT_SCHEMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
STORED = "stored"  # a folder that is quantised already: what it holds
_STORED_NAMES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def stored_scheme(model: Path | CheckpointIndex) -> str:
    """The scheme of a folder as stored: its float type, or STORED. Raises ModelNotFound, CorruptCheckpoint."""
    sizes: Counter[str] = Counter()
    for info in index_of(model).tensors.values():
        sizes[info.dtype] += info.num_bytes
    return _STORED_NAMES.get(sizes.most_common(1)[0][0], STORED)


def gguf_type(scheme: str) -> str | None:
    """The type of the GGUF file with as many bits; llama.cpp's own tool makes Q4_K_M. None for STORED."""
    if scheme in FLOAT_SCHEMES:
        return scheme.upper()
    return {8: "Q8_0", 4: "Q4_K_M"}[SCHEMES[scheme].bits] if scheme in SCHEMES else None


class BenchFiles:
    """Files for one model folder, under `cache`, in their own folder. Its name changes with the model's files."""

    def __init__(self, model: Path | CheckpointIndex, cache: Path) -> None:
        index = index_of(model)
        self.model = index.folder
        self.stored = stored_scheme(index)
        marks = [str(self.model.resolve())]
        for path in sorted(self.model.glob("*.safetensors")):
            status = path.stat()
            marks.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
        digest = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:12]
        self._folder = cache / f"{self.model.resolve().name}-{digest}"

    def folder_of(self, scheme: str) -> Path:
        """The model folder itself for float schemes, else a quantised one: rounded to nearest, no text needed."""
        if scheme in FLOAT_SCHEMES or scheme == self.stored:
            return self.model
        out = self._folder / scheme
        if not out.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            _verb("quantize", str(self.model), str(out), "--scheme", scheme)
        return out

    def gguf_of(self, scheme: str, *, llama_quantize: str | None) -> Path:
        """The GGUF file to compare a scheme with. `llama_quantize`: the tool, which Q4_K_M needs."""
        kind = gguf_type(scheme)
        assert kind is not None
        out = self._folder / f"{kind.lower()}.gguf"
        if out.is_file():
            return out
        self._folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(beside=out) as made:
            part = made / out.name
            if kind == "Q4_K_M":
                if llama_quantize is None:
                    raise UsageError("peer llama.cpp: llama-quantize, which makes Q4_K_M, is not beside llama-bench")
                source = self.gguf_of("bf16", llama_quantize=None)
                _run([llama_quantize, str(source), str(part), kind], what=f"llama-quantize to {kind}")
            else:
                _verb("convert", str(self.model), str(part), "--type", kind.lower())
            move_file(part, out)
        return out


def cached_share(paths: list[Path]) -> float | None:
    """The share of the files' pages in the system's file cache, from samples; None where it cannot be determined."""
    if not hasattr(os, "preadv") or not hasattr(os, "RWF_NOWAIT"):
        return None
    buffer = bytearray(1)
    cached = total = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            for offset in range(0, size, max(1 << 20, size // 1000)):
                total += 1
                try:
                    cached += os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
                except BlockingIOError:
                    pass
                except OSError:
                    return None
        finally:
            os.close(descriptor)
    return cached / total if total else None


def _verb(verb: str, *arguments: str) -> None:
    """Run a verb in a process of its own, so that its memory is free afterwards."""
    print(f"{verb} {' '.join(arguments)}", file=sys.stderr)
    _run([sys.executable, "-m", "qnext", verb, *arguments], what=f"qnext {verb}")


def _run(command: list[str], *, what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        error = QnextError(f"{what} failed: {lines[-1].removeprefix(what + ': ')}")
        error.exit_code = done.returncode if done.returncode in (2, 3, 4, 5) else 2
        raise error
