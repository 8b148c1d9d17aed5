"""A process that makes an engine, runs its worst steps and prints what memory they took; test_memory.py starts it."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from pathlib import Path

import torch

from qnext.config import ModelConfig, hybrid_pattern
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.model import CausalLM, initialize


def config(*, hidden: int, experts: int, vocab: int, context: int) -> ModelConfig:
    """A hybrid whose activations outweigh what a process takes anyway."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        layer_types=hybrid_pattern(4, interval=4),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        partial_rotary_factor=0.25,
        rope_theta=1e7,
        max_position_embeddings=context,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=hidden // 8,
        linear_value_head_dim=hidden // 8,
        linear_conv_kernel_dim=4,
        intermediate_size=2 * hidden,
        num_experts=experts,
        num_experts_per_tok=4 if experts else 0,
        moe_intermediate_size=hidden // 2,
        shared_expert_intermediate_size=hidden // 2 if experts else 0,
        initializer_range=0.05,
    )


def resident() -> int:
    """Bytes of memory that this process has."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


class _MallocInfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


class Watch:
    """The most bytes that were allocated while it ran, above those at its start; looks every half millisecond."""

    def __init__(self) -> None:
        self._info = ctypes.CDLL(None).mallinfo2
        self._info.restype = _MallocInfo
        self._start = self.peak = self._used()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._is_over = False
        self._thread.start()

    def stop(self) -> int:
        self._is_over = True
        self._thread.join()
        return self.peak - self._start

    def _used(self) -> int:
        found = self._info()
        return int(found.uordblks + found.hblkhd)

    def _look(self) -> None:
        while not self._is_over:
            self.peak = max(self.peak, self._used())
            time.sleep(0.0005)


def main(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    made = config(**options["config"])  # type: ignore[arg-type]
    with torch.device("meta"):
        model = CausalLM(made)
    model = model.to(getattr(torch, str(options["dtype"]))).to_empty(device="cpu").eval()
    initialize(model, seed=0)
    ctypes.CDLL(None).malloc_trim(0)  # what making the model has freed would hide as much of the caches
    before = resident()
    engine = Engine.of(model, EngineConfig(**options["engine"]))  # type: ignore[arg-type]
    after = resident()
    watch = Watch()
    length = engine.max_model_len
    prompt = [i * 7919 % made.vocab_size for i in range(length - 40)]
    sampled = SamplingParams(max_tokens=4, temperature=1.0, top_p=0.9, seed=1, ignore_eos=True)
    engine.generate([prompt], SamplingParams(max_tokens=40, prompt_logprobs=1, logprobs=5, ignore_eos=True))
    num_seqs = engine.memory_plan.max_num_seqs
    share = engine.memory_plan.num_blocks * 16 // num_seqs - 48
    for count in (1, num_seqs):
        prompts = [[n, *prompt[: min(share, length - 41)]] for n in range(count)]
        engine.generate(prompts, sampled)
    plan = engine.memory_plan
    print(
        json.dumps(
            {
                "caches": plan.kv_bytes + plan.state_bytes,
                "workspace": plan.workspace_bytes,
                "made": after - before,
                "steps": watch.stop(),
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
