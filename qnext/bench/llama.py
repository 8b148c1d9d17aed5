"""llama.cpp as a contestant of `bench`: its own llama-bench, one process for every figure and round."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qnext.errors import DoesNotFit, UsageError
from qnext.openmp import environment_of_others

_KILLED = -9


class LlamaTools(NamedTuple):
    bench: str
    quantize: str | None


def find_tools(folder: Path | None) -> LlamaTools:
    """llama-bench and llama-quantize in `folder`, or on the PATH. Raises UsageError without llama-bench."""
    where = None if folder is None else str(folder)
    bench = shutil.which("llama-bench", path=where)
    if bench is None:
        place = "the PATH" if folder is None else str(folder)
        raise UsageError(
            f"peer llama.cpp: no llama-bench in {place}; build https://github.com/ggml-org/llama.cpp "
            "and name the folder of its programs with --llama-cpp"
        )
    return LlamaTools(bench, shutil.which("llama-quantize", path=where))


class LlamaBench:
    """Runs llama-bench on one GGUF file. Each run loads the file again, and warms itself up before it measures.

    `options` are more of llama-bench's own, such as how the file is loaded.
    """

    def __init__(
        self, bench: str, gguf: Path, *, threads: int, decode_tokens: int, options: Sequence[str] = ()
    ) -> None:
        self._command = [bench, "-m", str(gguf), "-t", str(threads), "-r", "1", "-o", "json", *options]
        self.gguf = gguf
        self._decode_tokens = decode_tokens
        self._peak_bytes = 0
        self._about: dict[str, Any] = {}

    def step(self, kind: str, length: int) -> float:
        """Seconds of a prefill of `length` tokens, or of decoding at that depth."""
        if kind == "prefill":
            return self.prefill_seconds(length, 0)
        answer = self._run("-p", "0", "-n", str(self._decode_tokens), "-d", str(length))
        return self._decode_tokens / answer["avg_ts"]

    def prefill_seconds(self, num_tokens: int, depth: int) -> float:
        """Of so many tokens of a prompt behind `depth` others, which are computed first."""
        answer = self._run("-p", str(num_tokens), "-n", "0", *(("-d", str(depth)) if depth else ()))
        return num_tokens / answer["avg_ts"]

    def load(self) -> dict[str, float]:
        """Seconds of a whole process that loads the file and computes one token."""
        start = time.perf_counter()
        self._run("-p", "0", "-n", "1", "--no-warmup")
        return {"process_seconds": time.perf_counter() - start}

    def facts(self) -> dict[str, Any]:
        """llama.cpp's description of the file, and the most memory that any run held, mapped files included."""
        return {**self._about, "peak_bytes": self._peak_bytes}

    def _run(self, *options: str) -> dict[str, Any]:
        command = [*self._command, *options]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment_of_others()
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
            self._peak_bytes = max(self._peak_bytes, usage.ru_maxrss * 1024)
            out.seek(0)
            err.seek(0)
            return self._read(process.returncode, out.read(), err.read().decode(errors="replace"))

    def _read(self, code: int, out: bytes, err: str) -> dict[str, Any]:
        if code == _KILLED:
            raise DoesNotFit(f"llama-bench was killed on {self.gguf}, perhaps for lack of memory")
        try:
            (answer,) = json.loads(out)
            self._about = {
                "type": str(answer["model_type"]),
                "file_bytes": int(answer["model_size"]),
                "build": str(answer["build_commit"]),
            }
            float(answer["avg_ts"])
        except (ValueError, KeyError, TypeError):
            errors = [line for line in err.splitlines() if line.strip()] or ["no message"]
            raise UsageError(
                f"llama-bench could not measure {self.gguf} (exit code {code}): {errors[-1].strip()}"
            ) from None
        return answer
