"""`qnext experts`: which experts a text goes to, which go together, and what another text or model changes of that."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qnext.cli.flags.sampling import DType, ExpertMemory, Speculation
from qnext.cli.flags.values import AsJson, Model, Strict
from qnext.cli.terminal.progress import byte_progress, token_progress
from qnext.cli.terminal.source import TextFlags
from qnext.cli.terminal.text import note
from qnext.errors import UsageError
from qnext.text.files import read_user_text

if TYPE_CHECKING:
    from qnext.diagnostics.experts import ExpertAnswer, ExpertQuestion, LayerComparison, LayerReport
    from qnext.diagnostics.routing.ablation import AblationPlan
    from qnext.diagnostics.routing.alerts import FoundAlert, Judging
    from qnext.diagnostics.routing.findings import ComparedRecords
    from qnext.session.folder import TextFolder


@dataclass(frozen=True)
class RunningFlags:
    """How MODEL is loaded and run."""

    speculation: Speculation = False
    dtype: DType = None
    expert_memory: ExpertMemory = None


@dataclass(frozen=True)
class AskingFlags:
    """What is asked beside the load."""

    other: Annotated[
        str | None,
        typer.Option(
            "--compare", metavar="MODEL2|RUN", help="the same tokens through this model, or with this adapter"
        ),
    ] = None
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="drift: another text through the same model")
    ] = None
    pairs: Annotated[bool, typer.Option("--pairs", help="experts that go together, in a layer and to the next")] = False

    ablate: Annotated[
        list[str] | None,
        typer.Option("--ablate", metavar="WHICH", help="the loss without an expert: 3:17 (layer 3), top:8 or spread:8"),
    ] = None
    removal: Annotated[
        Literal["reroute", "zero"],
        typer.Option("--ablate-by", help="the next best expert takes its place, or nothing does"),
    ] = "reroute"

    save_baseline: Annotated[
        Path | None, typer.Option("--save-baseline", metavar="FILE", help="keep the load, to measure later ones from")
    ] = None
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="measure drift and collapse from this load")
    ] = None
    alert: Annotated[
        str | None,
        typer.Option("--alert", metavar="...", help="skew=8,dead=0.2,collapse=0.1,drift=0.1: else exit code 1"),
    ] = None

    @property
    def need_records(self) -> bool:
        asked = (self.other, self.against, self.ablate, self.save_baseline, self.baseline, self.alert)
        return self.pairs or any(each is not None for each in asked)

    def judging(self) -> Judging:
        """Raises UsageError for a threshold that is none, and for a file that is no baseline."""
        from qnext.diagnostics.routing.alerts import Judging
        from qnext.planning.expert_alerts import ExpertThresholds
        from qnext.planning.expert_baseline import ExpertBaseline

        thresholds = ExpertThresholds() if self.alert is None else ExpertThresholds.parse(self.alert)
        if thresholds.needs_reference and self.baseline is None and self.against is None and self.other is None:
            raise UsageError("--alert drift: drift from what? --baseline, --against or --compare says it")
        baseline = None if self.baseline is None else ExpertBaseline.read(self.baseline)
        return Judging(thresholds, baseline, self.save_baseline, note)

    def ablation(self) -> AblationPlan | None:
        """Raises UsageError for a word that names no expert."""
        from qnext.diagnostics.routing.ablation import AblationPlan

        if self.ablate is None:
            return None
        plan = AblationPlan(tuple(self.ablate), self.removal)
        plan.check()
        return plan


@dataclass(frozen=True)
class ShowingFlags:
    """How much is shown, and where."""

    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="hottest experts and pairs to name")] = 5
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="heat map of MODEL, .svg or .png; more beside it")
    ] = None


def command(
    model: Model,
    *,
    source: TextFlags,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, metavar="N", help="count up to N tokens that the model goes on with")
    ] = 0,
    asking: AskingFlags,
    showing: ShowingFlags,
    running: RunningFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Print how evenly each layer uses its experts on a text.

    Entropy and balance (mean over highest count) are 1 where all experts do the same. With --compare: distance is the
    part of all choices that has moved, overlap the common part of the hottest experts; then how alike both choose token
    by token. With --speculation drafted tokens count as well, and the MTP layer that drafts them.
    """
    _check(source, asking, showing, running)
    ablation, judging = asking.ablation(), asking.judging()
    from qnext.diagnostics.experts import ExpertQuestion, compare, experts_document, experts_of_folder
    from qnext.session.folder import open_folder

    folder = open_folder(model, expert_memory=running.expert_memory)
    judging.check(folder.config)
    second = None if asking.other is None else _second(folder, asking.other)
    token_ids = folder.tokenizer.encode(source.read())
    against = [] if asking.against is None else folder.tokenizer.encode(read_user_text(asking.against))
    question = ExpertQuestion(showing.top, running.dtype, max_tokens, bool(running.speculation), against=against)
    question = replace(question, with_record=asking.need_records, with_scores=second is not None, ablation=ablation)
    count = partial(experts_of_folder, loading=byte_progress, counting=token_progress)
    first = count(folder, token_ids, question)
    tokens = [*token_ids, *first.generated]
    other = None if second is None else count(second.folder, tokens, second.question(question))
    comparisons = [] if other is None else compare(first.layers, other.layers)
    found = _findings(asking, showing, first, other)
    alerts = [] if found is None else judging.judge(found, model=model)
    if showing.picture is not None:
        _draw(showing.picture, first, asking, f"{model}, {len(tokens):,} tokens")
    told = _ToldBeside(comparisons, found, None if asking.alert is None else alerts)
    if as_json:
        others = [] if other is None else other.layers
        document = experts_document(first.layers, asking.other, others, comparisons) | told.document()
        print(json.dumps({"model": model, "tokens": len(token_ids), "generated": len(first.generated)} | document))
    else:
        told.show(first.layers)
    for line in told.lines():
        print(f"qnext experts: {line}", file=sys.stderr)
    if alerts:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _ToldBeside:
    """What is told beside the load. `alerts` None: no thresholds were given."""

    comparisons: list[LayerComparison]
    found: ComparedRecords | None
    alerts: list[FoundAlert] | None

    def show(self, layers: list[LayerReport]) -> None:
        from qnext.diagnostics.tables import show_experts

        show_experts(layers, self.comparisons)
        if self.found is not None:
            self.found.findings.show()

    def document(self) -> dict[str, Any]:
        document = {} if self.found is None else self.found.findings.document()
        return document if self.alerts is None else {**document, "alerts": [each.document() for each in self.alerts]}

    def lines(self) -> list[str]:
        """The alerts: those of the thresholds, or of the usual changes of a comparison."""
        if self.alerts is not None:
            return [each.line for each in self.alerts]
        return [each.alert for each in self.comparisons if each.alert]


def _check(source: TextFlags, asking: AskingFlags, showing: ShowingFlags, running: RunningFlags) -> None:
    """What can be wrong before a file is read. Raises UsageError."""
    source.check()
    if showing.picture is not None:
        from qnext.diagnostics.heatmap import check_picture

        check_picture(showing.picture)
    if asking.other is not None and running.speculation:
        raise UsageError("--compare counts the same tokens in both models, but --speculation counts drafts too")


@dataclass(frozen=True)
class _Second:
    """The model that is compared: another folder, or the first one with an adapter."""

    folder: TextFolder
    adapter: Path | None

    def question(self, first: ExpertQuestion) -> ExpertQuestion:
        return replace(first, max_tokens=0, speculation=False, against=(), ablation=None, adapter=self.adapter)


def _second(first: TextFolder, name: str) -> _Second:
    """Raises UsageError for a model whose tokens, layers or experts are others."""
    from qnext.checkpoint.adapters import find_adapter
    from qnext.diagnostics.experts import check_pair
    from qnext.errors import ModelNotFound
    from qnext.session.folder import open_folder

    try:
        return _Second(replace(first), find_adapter(name))
    except ModelNotFound:
        folder = open_folder(name)
    check_pair(first, folder)
    return _Second(folder, None)


def _findings(
    asking: AskingFlags, showing: ShowingFlags, first: ExpertAnswer, other: ExpertAnswer | None
) -> ComparedRecords | None:
    from qnext.diagnostics.routing.findings import OtherRecord, compare_records

    if first.record is None:
        return None
    other_text = other_model = None
    if first.against is not None:
        other_text = OtherRecord(str(asking.against), first.against)
    if other is not None and other.record is not None:
        other_model = OtherRecord(str(asking.other), other.record)
    num_pairs = showing.top if asking.pairs else None
    return compare_records(
        first.record, num_pairs=num_pairs, other_text=other_text, other_model=other_model, ablation=first.ablation
    )


def _draw(path: Path, found: ExpertAnswer, asking: AskingFlags, title: str) -> None:
    """The heat map, and beside it a picture of what else was asked."""
    from qnext.diagnostics.experts import relative_loads
    from qnext.diagnostics.heatmap import write_picture
    from qnext.diagnostics.routing.pictures import beside, write_effects_picture, write_pairs_picture

    layers = found.layers
    write_picture(path, relative_loads(layers), labels=[layer.label for layer in layers], title=f"load of {title}")
    note(str(path))
    if asking.pairs and found.record is not None:
        write_pairs_picture(beside(path, "pairs"), found.record, title=title)
        note(str(beside(path, "pairs")))
    if found.ablation is not None:
        write_effects_picture(beside(path, "effects"), found.ablation, title=title)
        note(str(beside(path, "effects")))
