"""Shards of the source that are given up one after another: the same folder, whatever ends a run on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import quantize_in_runs as runs
from qnext.checkpoint.names import expected_tensors
from qnext.checkpoint.quantize import quantize_folder
from qnext.checkpoint.quantize_in_runs import quantize_in_runs
from qnext.checkpoint.shard_source import LocalShards
from qnext.checkpoint.weight_source import FolderWeights, Group
from qnext.errors import CorruptCheckpoint, DoesNotFit, UsageError
from qnext.quant.report import QualityReport
from qnext.quant.scheme import make_policy
from tests.checkpoint.folders import make_fp8, poke, shard_of
from tests.checkpoint.quantized import NEXT, save_random
from tests.provenance import content_of

SCHEME = "int4-g32"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are tiny: a second thread only waits."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("runs") / "source", NEXT, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(original: Path) -> Path:
    """What one run makes of a folder that stays."""
    out = original.parent / "expected"
    policy = make_policy(SCHEME, head=None, is_tied=False)
    report = quantize_folder(original, out, policy=policy, max_shard_bytes=90_000)
    (original.parent / "report.json").write_text(json.dumps(report.to_json()))
    return out


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "source")
    return tmp_path / "source"


def run(source: Path, out: Path, scheme: str = SCHEME) -> QualityReport:
    return quantize_in_runs(LocalShards(source), out, scheme=scheme, max_shard_bytes=90_000)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_the_folder_is_that_of_one_run_and_the_shards_are_gone(source: Path, expected: Path) -> None:
    assert len(shards(source)) == 5
    report = run(source, source.parent / "out")
    assert content_of(source.parent / "out") == content_of(expected)
    assert json.loads(json.dumps(report.to_json())) == json.loads((expected.parent / "report.json").read_text())
    assert shards(source) == []
    assert {path.name for path in source.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    assert {path.name for path in source.parent.iterdir()} == {"source", "out"}


class Stopped(Exception):
    """Stands for a kill: nothing of ours handles it."""


@pytest.mark.parametrize("where", ["record", "drop", "sync"])
def test_a_run_goes_on_where_another_ended(
    where: str, source: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at every shard in turn, before and after what was done is recorded."""
    out = source.parent / "out"
    home = {"record": runs.Ledger, "drop": LocalShards, "sync": runs.QuantizedOutput}[where]
    name = "write_all" if where == "sync" else where
    call: Callable[..., object] = getattr(home, name)
    left, made = [1], [0]

    def stopping(*args: object, **options: object) -> object:
        if where == "drop" and not args[1].exists():  # type: ignore[attr-defined]
            return None
        if not left[0]:
            raise Stopped
        left[0] -= 1
        result = call(*args, **options)
        made[0] += 1
        return result

    monkeypatch.setattr(home, name, stopping)
    for _ in range(40):
        left[0] = 1
        before = shards(source)
        try:
            run(source, out)
        except Stopped:
            assert not out.exists()
            assert not (source.parent / "out.unfinished/made/config.json").exists()
            assert len(before) - len(shards(source)) <= 1
        else:
            break
    assert content_of(out) == content_of(expected)
    assert shards(source) == [] and not (source.parent / "out.unfinished").exists()
    assert made[0] >= 5


def test_what_is_done_is_not_done_again(original: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the shard in whose midst the first run ended."""
    last = "model.layers.2.mlp.experts.1.down_proj.weight"
    reads: list[str] = []
    is_stopped = False

    def counting(self: FolderWeights, group: Group) -> list[torch.Tensor]:
        nonlocal is_stopped
        reads.extend(part.name for part in group.parts)
        if last in reads and not is_stopped:
            is_stopped = True
            raise Stopped
        return read(self, group)

    read = FolderWeights.read
    monkeypatch.setattr(FolderWeights, "read", counting)
    with pytest.raises(Stopped):
        run(source, source.parent / "out")
    first = set(reads)
    reads.clear()
    run(source, source.parent / "out")
    assert {shard_of(original, name) for name in first & set(reads)} == {shard_of(original, last)}
    assert len(reads) == len(set(reads)) and first | set(reads) == set(expected_tensors(NEXT))


def test_packed_weights_whose_parts_lie_in_several_shards(source: Path, tmp_path: Path) -> None:
    """An FP8 weight and its scales: a shard stays until nothing needs it."""
    make_fp8(source)
    names = list(json.loads(_split(source))["weight_map"])
    assert any(name.endswith("_scale_inv") for name in names)
    shutil.copytree(source, tmp_path / "kept")
    policy = make_policy(SCHEME, head=None, is_tied=False)
    quantize_folder(tmp_path / "kept", tmp_path / "expected", policy=policy, max_shard_bytes=90_000)
    run(source, tmp_path / "out")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")
    assert shards(source) == []


def _split(folder: Path) -> str:
    """Scales in the first shard, what they scale in the other two, the last weights first."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    groups = [[name for name in names if name.endswith("_scale_inv")]]
    rest = [name for name in names if name not in groups[0]]
    groups += [rest[::2], rest[1::2]]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in group}, folder / file)
        weight_map |= dict.fromkeys(group, file)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return text


def test_a_corrupt_shard_is_named_and_stays(source: Path) -> None:
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    poke(source, name, torch.tensor(torch.nan, dtype=torch.bfloat16))
    file = shard_of(source, name)
    before = shards(source)
    with pytest.raises(CorruptCheckpoint, match=rf"{file.name}: tensor {name} holds NaN"):
        run(source, source.parent / "out")
    assert file.exists() and 0 < len(before) - len(shards(source)) < len(before)
    assert not (source.parent / "out").exists()


def test_shards_that_changed_or_went_between_two_runs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = source / shards(source)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(LocalShards, "drop", lambda self, file: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(source, source.parent / "out")
    whole = last.read_bytes()
    last.write_bytes(whole.replace(b'"BF16"', b'"F16" ', 1))
    with pytest.raises(CorruptCheckpoint, match=rf"{last.name}: holds other tensors"):
        run(source, source.parent / "out")
    last.unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"{last.name}: file is missing, and it is not done"):
        run(source, source.parent / "out")
    last.write_bytes(whole)
    made = next((source.parent / "out.unfinished/made").glob("*.safetensors"))
    made.write_bytes(b"something else")
    with pytest.raises(CorruptCheckpoint, match=rf"{made.name}: is not what an earlier run has written"):
        run(source, source.parent / "out")


def test_refusals_leave_nothing(source: Path, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = source.parent
    for folder, error in ((expected, "quantised already"), (source, "not empty")):
        with pytest.raises(UsageError, match=error):
            run(folder, source if folder == source else root / "out")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "check_disk", lambda folder, needed: (_ for _ in ()).throw(DoesNotFit(f"{needed}")))
        with pytest.raises(DoesNotFit):
            run(source, root / "out")
    first = source / shards(source)[0]
    first.rename(root / "blob")
    first.symlink_to(root / "blob")
    with pytest.raises(UsageError, match="is a link"):
        run(source, root / "out")
    assert {path.name for path in root.iterdir()} == {"source", "blob"}


def test_a_disk_that_has_room_for_less_than_the_whole_is_enough(
    source: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted makes room for what is written; what is downloaded takes some."""
    needed: list[int] = []

    def refusing(folder: Path, num_bytes: int) -> None:
        needed.append(num_bytes)
        raise DoesNotFit("no")

    monkeypatch.setattr(runs, "check_disk", refusing)
    sizes = [(source / name).stat().st_size for name in shards(source)]
    for is_elsewhere in (False, True):
        monkeypatch.setattr(LocalShards, "is_elsewhere", is_elsewhere)
        with pytest.raises(DoesNotFit):
            run(source, source.parent / "out")
    whole = json.loads((expected.parent / "report.json").read_text())["bytes_quantized"]
    assert needed[0] < 0.5 * whole
    assert whole < needed[1] < whole + max(sizes)


def test_another_task_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LocalShards, "drop", lambda self, file: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(source, source.parent / "out")
    with pytest.raises(UsageError, match="begun with the scheme int4-g32, not int8; give the same, or delete"):
        run(source, source.parent / "out", "int8")
    (source.parent / "out.unfinished/plan.json").write_text('{"format": "qnext-quantize-1", "task": {}}')
    with pytest.raises(CorruptCheckpoint, match=r"plan\.json: is no plan"):
        run(source, source.parent / "out")


def test_two_at_once_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def second(self: LocalShards, file: Path) -> None:
        with pytest.raises(UsageError, match="another process is at it") as error:
            run(source, source.parent / "out")
        seen.append(str(error.value))

    monkeypatch.setattr(LocalShards, "drop", second)
    run(source, source.parent / "out")
    assert len(seen) == 5


def test_what_a_kill_at_the_very_end_leaves(source: Path, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has its name, and the rest was not deleted."""
    from qnext.files import unfinished

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "remove_folder", lambda folder: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(source, source.parent / "out")
    assert content_of(source.parent / "out") == content_of(expected)
    assert (source.parent / "out.unfinished").exists()
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(source, source.parent / "out")
    assert not (source.parent / "out.unfinished").exists()
