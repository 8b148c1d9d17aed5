"""The program of a rank that another process has started. Its argument is a RankStart."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings

from qnext.errors import LostRank, QnextWarning
from qnext.interrupts import ENDING_SIGNALS


def main() -> None:
    """Ends the process, with 0 where the first rank has closed its engine."""
    threading.Thread(target=_end_with_the_first_rank, daemon=True).start()
    for number in ENDING_SIGNALS:  # the first rank decides when its answers are complete
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore", QnextWarning)  # the first rank has told them
    from qnext.session.rank_processes import RankStart
    from qnext.session.ranks import follow_first

    code = follow_first(RankStart.from_argument(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)


def _end_with_the_first_rank() -> None:
    """Nobody writes to standard input; it ends with the process that holds its other end."""
    os.read(0, 1)
    os._exit(LostRank.exit_code)


if __name__ == "__main__":
    main()
