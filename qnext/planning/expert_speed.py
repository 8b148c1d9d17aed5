"""How fast a model runs whose experts are partly on disk: predicted from sizes, traffic and rates. No torch.

A decode step reads the weights that every token needs, then in each layer the experts of its tokens: those in memory
are computed while the others are read from the disk. A prompt passes a layer in chunks, and a chunk reads every expert
that it needs and that is not in memory, once, while others are computed.
"""

from __future__ import annotations

from bisect import bisect_right
from math import comb
from typing import NamedTuple

from qnext.planning.counts import distinct_experts
from qnext.planning.expert_memory import ExpertSizes

# What a whole model reaches of the rates at which experts alone are computed (qnext.ops.expert_rates). Medians of turns
# on eight layers of the 80B in int4-g32, 128 experts each, on two cores that others used as well: 0.94 and 1.14 of
# decoding in memory, 0.77 to 0.91 of prompts of 512 and 2,048 tokens. With 28 % of the experts in memory and these
# numbers a token took 0.93 of the predicted time (0.76 to 1.12 in eight turns).
DECODE_SHARE = 1.0
PROMPT_SHARE = 0.85
# How often the memory sees a record that comes from disk, beyond the product: it is written there, and its checksum
# read. With random routing (61 % missed) a token of the 80B took 0.22 s beside its waits, in service traffic 0.15.
ARRIVAL_PASSES = 2
# The look-ahead, as residency.cpp has it: reads that a layer begins for the next one, and the share of them that is
# right where a model routes by itself (2,323 guesses of the 80B with random weights: 0.88).
GUESSES_OF_LAYER = 2
RIGHT_GUESSES = 0.88

TRAFFIC = ("uniform", "diverse", "service")
# Hit rates of the policy of qnext.residency (half life 64) on its traces, 512 experts of which 10 are used, in steps of
# one token: 2,500 tokens after 1,500 that warm; three flat layers (0, 1) and 45 others (9 to 12), as in the 80B.
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_HIT_RATES = {
    "uniform": _SHARES,
    "diverse": (
        *(0.0, 0.13, 0.23, 0.336, 0.416, 0.478, 0.536, 0.586, 0.629, 0.671, 0.707, 0.742, 0.804, 0.859, 0.91, 0.957),
        *(0.978, 1.0),
    ),
    "service": (
        *(0.0, 0.38, 0.588, 0.736, 0.815, 0.86, 0.892, 0.914, 0.929, 0.942, 0.952, 0.96, 0.972, 0.981, 0.988, 0.994),
        *(0.997, 1.0),
    ),
}
# How much less a share holds where each token uses more of the experts: exponents that fit the same measurement with
# 128 to 1,024 experts and a fiftieth to a sixteenth of them used, within 4 points of hit rate for shares from 0.1 on.
_USED_SHARE = 10 / 512
_CROWDING = {"uniform": 0.0, "diverse": 0.3, "service": 0.75}


class MachineRates(NamedTuple):
    """In a second: bytes of weights in memory that kernels multiply by a row, bytes from disk, operations of kernels
    on many rows."""

    memory: float
    disk: float
    arithmetic: float


class StepWork(NamedTuple):
    """What computing takes: bytes of all weights that every token needs, of what one sequence carries (states, keys
    and values), and operations of a token. `used_experts` are those of a token in each layer."""

    dense_bytes: int
    sequence_bytes: int
    operations: int
    used_experts: int
    experts: ExpertSizes


def expected_hit_rate(traffic: str, share: float, *, used_share: float) -> float:
    """Share of the experts of a token that are in memory, where `share` of each layer's are and a token uses
    `used_share` of them.

    The traces keep their hit rates when experts and used experts grow together. They do not hold for layers of less
    than 128 experts, nor where less stays in memory than one token uses.

    >>> expected_hit_rate("uniform", 0.4, used_share=0.02)
    0.4
    """
    if not 0.0 < share < 1.0:
        return float(share >= 1.0)
    odds = share / (1 - share) * (_USED_SHARE / used_share) ** _CROWDING[traffic]
    share = odds / (1 + odds)
    rates = _HIT_RATES[traffic]
    right = bisect_right(_SHARES, share)
    weight = (share - _SHARES[right - 1]) / (_SHARES[right] - _SHARES[right - 1])
    return rates[right - 1] + weight * (rates[right] - rates[right - 1])


class TokenTime(NamedTuple):
    """Seconds of one token: of arithmetic, of reading from disk, and how much of these two passes at the same time."""

    arithmetic: float
    read: float
    overlapped: float

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.read - self.overlapped

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return 1 / self.seconds


def decode_time(
    work: StepWork, rates: MachineRates, hit_rate: float, *, batch: int = 1, right_guesses: float = RIGHT_GUESSES
) -> TokenTime:
    """Of each token where `batch` sequences go on by one in a step.

    How many experts of a layer have to be read varies from step to step, binomially. A layer first computes what every
    token needs. Guesses of the layer before are read meanwhile, and what is not read by then is in the way of the
    others. Then it takes as long as the longer of computing its experts and of reading those that were not guessed,
    behind which the last one is still to be computed. With less than `right_guesses` of use nothing is guessed.
    """
    experts, memory = work.experts, DECODE_SHARE * rates.memory
    num_layers = max(1, experts.num_layers)
    dense = (work.dense_bytes + batch * work.sequence_bytes) / memory / num_layers
    count = round(_touched(work, batch)) if experts.num_layers else 0
    compute, read = experts.record_bytes / memory, experts.record_bytes / rates.disk
    arithmetic = reads = seconds = 0.0
    for misses in range(count + 1):
        chance = comb(count, misses) * (1 - hit_rate) ** misses * hit_rate ** (count - misses)
        guesses = min(GUESSES_OF_LAYER, misses) if right_guesses else 0
        late = max(0.0, guesses * read - dense)
        computed = (count + ARRIVAL_PASSES * misses) * compute
        waited = late + (misses - guesses * right_guesses) * read + compute if misses else 0.0
        arithmetic += chance * (dense + computed)
        reads += chance * (misses + guesses * (1 - right_guesses)) * read
        seconds += chance * (dense + max(computed, waited))
    arithmetic, reads, seconds = (num_layers * value / batch for value in (arithmetic, reads, seconds))
    return TokenTime(arithmetic, reads, arithmetic + reads - seconds)


def prefill_time(work: StepWork, rates: MachineRates, share: float, *, num_tokens: int, chunk: int) -> TokenTime:
    """Of each token of a prompt in pieces of `chunk` tokens, where `share` of the experts are in memory.

    Of a piece's reads and its arithmetic the longer one counts, and of the other one a layer, which nothing hides.
    """
    experts = work.experts
    num_layers = max(1, experts.num_layers)
    arithmetic = reads = seconds = 0.0
    for first in range(0, num_tokens, chunk):
        count = min(chunk, num_tokens - first)
        touched = experts.num_layers * _touched(work, count)
        read = touched * (1 - share) * experts.record_bytes / rates.disk
        compute = max(
            count * work.operations / (PROMPT_SHARE * rates.arithmetic),
            (work.dense_bytes + touched * experts.record_bytes) / (DECODE_SHARE * rates.memory),
        )
        arithmetic, reads = arithmetic + compute, reads + read
        seconds += max(read, compute) + min(read, compute) / num_layers
    arithmetic, reads, seconds = (value / num_tokens for value in (arithmetic, reads, seconds))
    return TokenTime(arithmetic, reads, arithmetic + reads - seconds)


def missed_bytes(work: StepWork, hit_rate: float) -> float:
    """Read from disk for a token of a single sequence: the disk's rate over these bounds its speed."""
    return work.experts.num_layers * work.used_experts * (1 - hit_rate) * work.experts.record_bytes


def _touched(work: StepWork, num_tokens: int) -> float:
    return distinct_experts(work.experts.num_experts, work.used_experts, num_tokens)
