"""What a bench measures, and the combinations that it refuses before any work."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from qnext.bench.files import FLOAT_SCHEMES, BenchFiles, gguf_type
from qnext.bench.llama import LlamaTools
from qnext.config import ModelConfig
from qnext.errors import UsageError
from qnext.quant.scheme import SCHEMES

QNEXT, LLAMA_CPP, TRANSFORMERS = "qnext", "llama.cpp", "transformers"
PEERS = (LLAMA_CPP, TRANSFORMERS)
_DEFAULT_DEPTHS = (0, 2048, 8192)


@dataclass(frozen=True)
class BenchPlan:
    """What to measure. `ggufs` names a file for a scheme; the others are made. `long_prefill` is timed once."""

    files: BenchFiles
    config: ModelConfig
    schemes: list[str]
    peers: list[str]
    threads: int
    prefill: int
    depths: list[int]
    decode_tokens: int
    rounds: int
    long_prefill: int | None = None
    expert_memory: int | None = None  # bytes for experts of qnext, the others of which stay on disk, or on the host
    device: str = "cpu"  # where qnext computes
    llama: LlamaTools | None = None
    ggufs: dict[str, Path] = field(default_factory=dict)
    date: str | None = None

    def peers_of(self, scheme: str) -> list[str]:
        """Peers that have weights of this scheme: transformers reads only the float folder, llama.cpp what has a GGUF
        type."""
        found = []
        for peer in self.peers:
            if peer == LLAMA_CPP and (gguf_type(scheme) is not None or scheme in self.ggufs):
                found.append(peer)
            if peer == TRANSFORMERS and scheme in FLOAT_SCHEMES:
                found.append(peer)
        return found

    def check(self) -> None:
        """Raises UsageError, naming the flag, for what cannot be measured."""
        counts = {"--prefill": self.prefill, "--decode": self.decode_tokens, "--rounds": self.rounds}
        for flag, value in {**counts, "--threads": self.threads}.items():
            if value < 1:
                raise UsageError(f"{flag} must be at least 1, not {value}")
        self._check_lengths()
        if TRANSFORMERS in self.peers and importlib.util.find_spec("transformers") is None:
            raise UsageError("peer transformers: not installed; pip install transformers")
        for name in self.peers:
            if not any(name in self.peers_of(scheme) for scheme in self.schemes):
                hint = (
                    "reads float folders; add --scheme bf16" if name == TRANSFORMERS else "needs --gguf for this folder"
                )
                schemes = ", ".join(self.schemes)
                raise UsageError(f"--peer {name}: nothing to compare in {schemes}; it {hint}")

    def _check_lengths(self) -> None:
        context = self.config.context_length
        deepest = deepest_of(self.config, self.decode_tokens)
        for depth in self.depths:
            if not 0 <= depth <= deepest:
                raise UsageError(
                    f"--depths: {depth} and {self.decode_tokens} decoded tokens are beyond the context of {context}; "
                    f"at most {max(deepest, 0)}"
                )
        for flag, length in (("--prefill", self.prefill), ("--long-prefill", self.long_prefill)):
            if length is not None and not 1 <= length < context:
                raise UsageError(f"{flag} {length}: a prompt has 1 to {context - 1} tokens in this context")


def deepest_of(config: ModelConfig, decode_tokens: int) -> int:
    """The largest depth at which that many tokens can still be decoded."""
    return config.context_length - decode_tokens - 1


def default_depths(config: ModelConfig, decode_tokens: int) -> list[int]:
    """As far as the context reaches."""
    return [depth for depth in _DEFAULT_DEPTHS if depth <= deepest_of(config, decode_tokens)]


def check_names(schemes: list[str], peers: list[str], *, stored: str) -> None:
    """Raises UsageError for an unknown scheme or peer. `stored` is the scheme of the folder as it is."""
    for name in peers:
        if name not in PEERS:
            raise UsageError(f"--peer {name}: must be {' or '.join(PEERS)}")
    for name in schemes:
        if name not in (*FLOAT_SCHEMES, *SCHEMES, stored):
            raise UsageError(f"--scheme {name}: must be one of {', '.join((*FLOAT_SCHEMES, *SCHEMES))}")
        if name != stored and stored not in FLOAT_SCHEMES:
            raise UsageError(f"--scheme {name}: the folder is quantised already; without --scheme it runs as it is")
