"""The program of a process that runs one side of a comparison: a request on standard input, its pass on output."""

from __future__ import annotations

import json
import sys

from qnext.diagnostics.inside.sides import Side, record_side
from qnext.errors import QnextError


def main() -> int:
    request = json.load(sys.stdin.buffer)
    try:
        found = record_side(Side(**request["side"]), request["token_ids"])
    except (QnextError, ImportError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", QnextError.exit_code)
    sys.stdout.buffer.write(found.to_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
