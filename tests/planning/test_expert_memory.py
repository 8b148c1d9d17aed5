"""What stays in memory of experts that do not all fit."""

from __future__ import annotations

import pytest

from qnext.config import preset
from qnext.errors import DoesNotFit
from qnext.planning.expert_memory import ExpertSizes, engine_reserve, plan_expert_memory

GIB = 1 << 30
CONFIG = preset("80b-a3b")
SIZES = ExpertSizes(num_layers=48, num_experts=512, record_bytes=1_769_472, other_bytes=3 * GIB)


def plan(free: float, wanted: float | None = None, sizes: ExpertSizes = SIZES):  # type: ignore[no-untyped-def]
    bytes_wanted = None if wanted is None else int(wanted * GIB)
    return plan_expert_memory(CONFIG, sizes, free_bytes=int(free * GIB), wanted_bytes=bytes_wanted, num_threads=2)


def test_what_fits_stays() -> None:
    reserve = engine_reserve(CONFIG, num_threads=2)
    enough = (SIZES.all_bytes + SIZES.other_bytes + reserve) / GIB
    assert plan(enough + 0.01) is None
    assert plan(enough - 0.01) is not None
    assert 1.5 * GIB < reserve < 5 * GIB


def test_the_rest_of_memory_is_for_experts() -> None:
    memory = plan(22)
    assert memory is not None
    reserve = engine_reserve(CONFIG, num_threads=2)
    room = 22 * GIB - SIZES.other_bytes - reserve
    assert room - SIZES.record_bytes < memory.num_bytes <= room
    assert max(memory.slots) - min(memory.slots) <= 1 and len(memory.slots) == 48
    assert memory.num_spare == 64


def test_memory_that_is_asked_for_is_taken() -> None:
    memory = plan(22, 4)
    assert memory is not None and 4 * GIB - SIZES.record_bytes < memory.num_bytes <= 4 * GIB
    everything = plan(60, 50)
    assert everything is not None and set(everything.slots) == {512}
    with pytest.raises(DoesNotFit, match=r"20\.0 GiB for experts and 3\.0 GiB of other weights, but 22\.0 GiB"):
        plan(22, 20)


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(DoesNotFit, match=r"experts on disk need 162\.0 MiB of memory at least"):
        plan(22, 0.1)
    with pytest.raises(DoesNotFit, match="0 B are left"):
        plan(2)
    smallest = plan(22, 0.17)
    assert smallest is not None and min(smallest.slots) >= 1 and smallest.num_spare >= 1
