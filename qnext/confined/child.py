"""The child's side: it takes requests from stdin, one after another, and answers on stdout, within its limits.

Frames: 4 bytes of length, then JSON. The first frame in holds the limits and the program's setup. The first frame out
is `{"ready": true}`. Other output of a program is discarded.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

AnswerRequest = Callable[[dict[str, Any]], dict[str, Any]]


def serve(begin: Callable[[dict[str, Any]], AnswerRequest]) -> None:
    """Answer requests until stdin ends. `begin` gets the parent's setup and returns the function that answers.

    A MemoryError becomes the answer `{"fault": "memory"}`. When the limit of processor time is exceeded, or the parent
    is gone for too long, SIGPROF or SIGALRM ends the process.
    """
    frames_in, frames_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    first = read_frame(frames_in)
    limits = first["limits"]
    # What `begin` maps, a vocabulary or a library, counts like the rest.
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    handler = begin(first["setup"])
    write_frame(frames_out, framed({"ready": True}))
    while True:
        request = read_frame(frames_in)
        # The parent kills sooner; this ends a loop whose parent was itself killed. The defaults end the process.
        signal.setitimer(signal.ITIMER_REAL, 2 * limits["seconds"])
        signal.setitimer(signal.ITIMER_PROF, limits["cpu_seconds"])
        try:
            frame = framed(handler(request))
        except MemoryError:
            frame = framed({"fault": "memory"})
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(frames_out, frame)


def read_frame(stream: BinaryIO) -> Any:
    """The next frame. Ends the process where there is none."""
    head = stream.read(4)
    if len(head) < 4:
        sys.exit(0)
    return json.loads(stream.read(struct.unpack(">I", head)[0]))


def framed(value: Any) -> bytes:
    data = json.dumps(value).encode("ascii")
    return struct.pack(">I", len(data)) + data


def write_frame(stream: BinaryIO, frame: bytes) -> None:
    stream.write(frame)
    stream.flush()
