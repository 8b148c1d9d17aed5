"""What does LoRA of all routed experts cost, against PEFT and transformers on the same weights, factors and tokens?

One step is forward, cross entropy, backward and AdamW in fp32 on a batch of sequences, with rank 8 on gate_up_proj and
down_proj of every expert and nothing else. Our side runs the batch as the training loop does: cut in parts that run
side by side. "qnext" has the factors that PEFT has; the losses of all steps must agree, the first one to rounding.
"qnext, shared" shares the outer factors of a layer. Memory is the peak of the process, and what of it a step takes
beside the loaded model: gradients, moments of AdamW and activations.
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from _pair import Contestants, Step, machine, print_json, ratios

import torch
from _steps import step_options

from qnext.config import preset, to_hf
from qnext.lora import Adapter, LoraConfig, adapter_of, add_lora, attach, lora_parameters
from qnext.lora.config import ROUTED
from qnext.model import Batch, CausalLM, initialize
from qnext.planning import list_parameters

LEARNING_RATE = 1e-3
RANK, ALPHA = 8, 16.0
_MIB = 1 << 20


class Measured(NamedTuple):
    """Of one step."""

    loss: float
    peak: int  # bytes of the process, since the step began
    beside_model: int  # of these, what the process did not have when the model was loaded


class Memory:
    """Of this process, from /proc. What is resident when it is made is the loaded model."""

    def __init__(self) -> None:
        self._loaded = self._value("VmRSS")

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def measured(self, loss: float) -> Measured:
        peak = self._value("VmHWM")
        return Measured(loss, peak, peak - self._loaded)

    @staticmethod
    def _value(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def _model(name: str) -> CausalLM:
    model = CausalLM(preset(name).with_(num_nextn_predict_layers=0))
    initialize(model, seed=0)
    return model


def _tokens(name: str, sequences: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, preset(name).vocab_size, (sequences, length + 1), generator=generator)


def _adapter(name: str, *, shares_outer: bool) -> Adapter:
    """Of the routed experts alone."""
    model = _model(name)
    infos = list_parameters(model.config)
    add_lora(model, LoraConfig("experts", rank=RANK, alpha=ALPHA, shares_outer=shares_outer))
    whole = adapter_of(model)
    return Adapter({key: part for key, part in whole.parts.items() if infos[key].kind in ROUTED}, whole.places)


def ours(*, name: str, sequences: int, length: int, threads: int, shares_outer: bool) -> Step:
    from qnext.ops import keep_freed_memory
    from qnext.training import Losses, LossPart
    from qnext.training.losses import head_loss_sum
    from qnext.training.threads import BackwardThreads

    torch.set_num_threads(threads)
    keep_freed_memory()
    model, tokens = _model(name), _tokens(name, sequences, length)
    attach(model, _adapter(name, shares_outer=shares_outer))
    parameters = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    workers = BackwardThreads(threads)
    memory = Memory()

    def part(rows: torch.Tensor) -> Losses:
        batch = Batch.from_lengths(rows[:, :-1].flatten(), [length] * len(rows))
        total = head_loss_sum(model, model(batch).hidden_TD, rows[:, 1:].flatten())
        return Losses({"main": LossPart(total / (sequences * length))})

    def step() -> Measured:
        memory.begin()
        losses = workers.backward([partial(part, rows) for rows in tokens.chunk(threads)], parameters)
        optimizer.step()
        optimizer.zero_grad()
        return memory.measured(sum(part.total.item() for part in losses))

    return step


def peft(*, name: str, sequences: int, length: int, threads: int) -> Step:
    import peft
    import transformers as hf

    from qnext.checkpoint.adapters import save_adapter

    torch.set_num_threads(threads)
    hf.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    source, tokens = _model(name), _tokens(name, sequences, length)
    values: dict[str, Any] = to_hf(source.config, dtype="float32")
    for key in ("architectures", "model_type"):
        values.pop(key)
    base = hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**values)).float().train()
    base.load_state_dict(source.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(_adapter(name, shares_outer=False), Path(folder) / "adapter", source.config, base=None)
        model = peft.PeftModel.from_pretrained(base, str(Path(folder) / "adapter"), is_trainable=True)
    del source
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    memory = Memory()

    def step() -> Measured:
        memory.begin()
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return memory.measured(loss.item())

    return step


def measure(name: str, *, sequences: int, length: int, threads: int, rounds: int) -> dict[str, Any]:
    arguments = {"name": name, "sequences": sequences, "length": length, "threads": threads}
    contestants = Contestants(
        {
            "qnext": (ours, {**arguments, "shares_outer": False}),
            "qnext, shared": (ours, {**arguments, "shares_outer": True}),
            "PEFT": (peft, arguments),
        }
    )
    seconds, values = contestants.run(warmup=2, rounds=rounds)
    contestants.close()
    curves = {key: [each.loss for each in steps] for key, steps in values.items()}
    gaps = [abs(a - b) for a, b in zip(curves["qnext"], curves["PEFT"], strict=True)]
    assert gaps[0] < 1e-5 and max(gaps) < 1e-2, f"losses differ by {gaps}"
    assert curves["PEFT"][-1] < curves["PEFT"][0], "nothing was learnt"
    return {
        "model": name,
        "seconds": {key: statistics.median(each) for key, each in seconds.items()},
        "times_as_fast": {key: ratios(seconds["PEFT"], each) for key, each in seconds.items()},
        "peak_bytes": {key: max(each.peak for each in steps) for key, steps in values.items()},
        "step_bytes": {key: max(each.beside_model for each in steps) for key, steps in values.items()},
        "losses": curves,
        "loss_gaps": gaps,
    }


def main() -> None:
    options = step_options(__doc__)
    results = []
    print(f"{machine()['cpu']}, {options.threads} threads, {options.sequences} x {options.length} tokens, rank {RANK}")
    for name in options.models:
        result = measure(
            name, sequences=options.sequences, length=options.length, threads=options.threads, rounds=options.rounds
        )
        results.append(result)
        for key, seconds in result["seconds"].items():
            faster, peak, beside = (result[what][key] for what in ("times_as_fast", "peak_bytes", "step_bytes"))
            print(
                f"{name:<12} {key:<14} {seconds * 1000:7.0f} ms a step, {faster['median']:5.2f} times as fast as PEFT "
                f"({faster['min']:.2f}-{faster['max']:.2f})   peak {peak / _MIB:6.0f} MiB, of which a step takes "
                f"{beside / _MIB:6.0f} MiB   loss {result['losses'][key][0]:.4f} -> {result['losses'][key][-1]:.4f}"
            )
        gaps = result["loss_gaps"]
        print(
            f"{name:<12} losses of qnext and PEFT differ by {gaps[0]:.1e} in the first step, at most by {max(gaps):.1e}"
        )
    print_json({"benchmark": "lora", "threads": options.threads, "rank": RANK, "results": results})


if __name__ == "__main__":
    main()
