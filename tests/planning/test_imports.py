"""Planning and the headers of a checkpoint are read without torch, which takes seconds to start."""

from __future__ import annotations

import subprocess
import sys


def test_no_torch() -> None:
    code = (
        "import sys, qnext.planning, qnext.checkpoint.header, qnext.checkpoint.check, qnext.checkpoint.resolve\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
