"""Which program of some is the last, and sees what all of them have written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(counter_ptr, num_programs):
    """To be asked once by each of so many programs, behind all that it reads and writes for the others. The counter is
    zero before the first one asks, and again behind the last one."""
    tl.debug_barrier()  # every thread of the program is there
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last
