"""Fine-tuning by an adapter: the choices of a task, the model that they adapt, and the folder that is left."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from qnext.checkpoint.adapters import IN_A_RUN, save_adapter
from qnext.checkpoint.provenance import Making
from qnext.config import ModelConfig
from qnext.errors import UsageError
from qnext.lora import Adapter, LoraConfig, adapter_of, add_lora, choose_experts, count_routing, describe_adapter
from qnext.lora.config import Targets
from qnext.model import Batch, CausalLM
from qnext.ops import LowRank
from qnext.training.ranks import TrainingRanks

_COVERAGE = 0.5


@dataclass(frozen=True)
class AdapterTask:
    """What a run is asked to adapt, in words that stand in its folder. Raises UsageError naming what is impossible.

    `experts` is "all", or "auto:coverage=X": in every layer the fewest that the data sends the share X of its tokens
    to. The other fields are those of LoraConfig.
    """

    targets: str = "all"
    rank: int = 8
    alpha: float = 16.0
    experts: str = "all"
    router: bool = False
    shares_outer: bool = True
    mtp: bool = True

    def __post_init__(self) -> None:
        self.config()
        _ = self.coverage

    @property
    def coverage(self) -> float | None:
        """The share of the data's tokens that the adapted experts get; None for all experts."""
        if self.experts == "all":
            return None
        match = re.fullmatch(r"auto(?::coverage=(\d*\.?\d+))?", self.experts)
        coverage = _COVERAGE if match and match[1] is None else float(match[1]) if match else 0.0
        if not 0.0 < coverage <= 1.0:
            raise UsageError(f"experts must be all or auto:coverage=X with X above 0 and at most 1, not {self.experts}")
        return coverage

    def config(self, experts: dict[int, tuple[int, ...]] | None = None) -> LoraConfig:
        if self.targets not in get_args(Targets):
            raise UsageError(f"lora must be one of {', '.join(get_args(Targets))}, not {self.targets!r}")
        return LoraConfig(
            self.targets,  # type: ignore[arg-type]
            self.rank,
            self.alpha,
            self.shares_outer,
            experts,
            self.router,
            self.mtp,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def adapt(model: CausalLM, task: AdapterTask, batches: Iterable[Batch], *, seed: int) -> str:
    """Freeze a model and adapt it, in place, and say what is trained. `batches` is a sample of the data, for the choice
    of experts; equal samples give equal choices."""
    coverage = task.coverage
    if coverage is None or not model.config.num_experts or task.targets == "attention":
        add_lora(model, task.config(), seed=seed)
        chosen = ""
    else:
        counts_LE = count_routing(model, batches)
        experts = choose_experts(model, counts_LE, coverage=coverage)
        if not task.mtp:
            experts.pop(model.config.num_hidden_layers, None)
        add_lora(model, task.config(experts), seed=seed)
        sizes = [len(each) for each in experts.values()]
        chosen = (
            f"; in each layer the {min(sizes)} to {max(sizes)} of {model.config.num_experts} experts that get "
            f"{coverage:.0%} of {int(counts_LE[0].sum()) // model.config.num_experts_per_tok:,} tokens"
        )
    return describe_adapter(adapter_of(model)).lines()[0] + chosen


def whole_adapter(model: CausalLM, ranks: TrainingRanks) -> Adapter:
    """The adapter of a model in training; all processes call this, and all have it then."""
    adapter = adapter_of(model)
    parts = {
        name: LowRank(ranks.value(part.A), ranks.value(part.B), part.scale) for name, part in adapter.parts.items()
    }
    return Adapter(parts, adapter.places)


def save_adapted(
    adapter: Adapter,
    config: ModelConfig,
    run: Path,
    *,
    base: str | Path,
    tokenizer_folder: Path | None,
    making: Making | None = None,
) -> Path:
    """Write the adapter of a trained model into the folder of its run, in place of an earlier one, with its tokenizer.

    Raises NoEffect where a part of it was not trained.
    """
    describe_adapter(adapter).check()
    folder = run / IN_A_RUN
    save_adapter(
        adapter, folder, config, base=str(base), tokenizer_folder=tokenizer_folder, overwrite=True, making=making
    )
    return folder
