"""Files of samples to shards: what is left out is counted and named, and a build that was killed goes on."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from qnext.errors import CorruptCheckpoint, QnextWarning, UsageError
from qnext.text.chat import ChatFormat
from qnext.text.lessons import Teacher
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import byte_level_tokenizer
from qnext.training import build as building
from qnext.training.build import Tokenizing, build, built
from qnext.training.shards import MANIFEST, Manifest

TOKENIZER = Tokenizer(byte_level_tokenizer(), eos_tokens=["<|im_end|>"])


def tokenizing(*, length: int = 200, taught: str = "assistant") -> Tokenizing:
    teacher = Teacher(ChatFormat.native("instruct"), TOKENIZER, TOKENIZER.eos_ids, taught)  # type: ignore[arg-type]
    return Tokenizing(teacher, TOKENIZER.token_id("<|endoftext|>"), length, {"tokenizer": "t", "taught": taught})


def chat(number: int) -> dict[str, object]:
    return {"prompt": f"What is {number}?", "completion": f"It is {number}."}


def write(path: Path, values: list[object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def texts(manifest: Manifest, folder: Path) -> list[str]:
    return [
        TOKENIZER.decode([token if token >= 0 else ~token for token in shard[index].tolist()])
        for shards in manifest.open(folder)
        for shard in shards
        for index in range(len(shard))
    ]


def test_samples_come_in_order_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        [
            chat(1),
            {"instruction": "What is 1?", "output": "It is 1."},
            {"messages": [{"role": "user", "content": "Hi"}]},
            chat(2),
            {"prompt": "x" * 200, "completion": "y"},
            {"text": "z" * 450},
        ],
    )
    other = write(tmp_path / "b.jsonl", [chat(2), chat(3)])
    manifest = build([file, other], tmp_path / "data", tokenizing())
    first, second = manifest.sources
    assert (first.num_samples, first.num_duplicates, second.num_samples, second.num_duplicates) == (5, 1, 1, 1)
    assert first.num_left_out == {"nothing to learn": 1, "too long": 1}
    assert first.first_left_out == {"nothing to learn": [f"{file}:3"], "too long": [f"{file}:5"]}
    found = texts(manifest, tmp_path / "data")
    assert ["It is 1." in found[0], "It is 2." in found[1], "It is 3." in found[-1]] == [True] * 3
    assert [len(text) for text in found[2:5]] == [201, 201, len("z" * 50 + "<|endoftext|>")]
    assert Manifest.read(tmp_path / "data") == manifest
    samples = [
        shard[index] for shards in manifest.open(tmp_path / "data") for shard in shards for index in range(len(shard))
    ]
    assert first.num_learned + second.num_learned == sum(int((each >= 0).sum()) for each in samples)
    assert first.num_tokens + second.num_tokens == sum(map(len, samples))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [{"messages": [{"role": "user", "content": "Hi"}]}],
            r"a\.jsonl: nothing to learn from in it; 1 samples: nothing",
        ),
        ([{"prompt": "x" * 300, "completion": "y"}], r"nothing to learn from in it; 1 samples: too long, such as .*:1"),
        ([chat(1), {"q": 1}], r"a\.jsonl:2: keys q are of no known form"),
        ([chat(1), {"messages": [{"role": "tool", "content": 7}]}], r"a\.jsonl:2: message 0: content must be"),
    ],
)
def test_data_that_teaches_nothing_or_is_no_data_is_refused(tmp_path: Path, values: list[object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build([write(tmp_path / "a.jsonl", values)], tmp_path / "data", tokenizing())
    assert Manifest.read(tmp_path / "data") is None


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_UNIT_SAMPLES", 3)


def test_a_killed_build_goes_on_and_makes_the_same(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", [chat(n) for n in range(10)])
    whole = build([file], tmp_path / "whole", tokenizing())
    assert len(whole.sources[0].shards) == 4
    made: list[str] = []
    write_shard = building.write_shard

    def counted(path: Path, *rest: object) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        return write_shard(path, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(building.torch, "get_num_threads", lambda: 1)  # else one more may be under way
        patch.setattr(building, "write_shard", counted)
        with pytest.raises(KeyboardInterrupt):
            build([file], tmp_path / "cut", tokenizing())
        assert Manifest.read(tmp_path / "cut") is None
        made[:] = []
        assert build([file], tmp_path / "cut", tokenizing()) == whole
    assert len(made) == 2, "the two of the killed build were taken as they were"
    assert texts(whole, tmp_path / "whole") == texts(whole, tmp_path / "cut")
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_any_number_of_threads_makes_the_same(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", [chat(n) for n in range(40)])
    made = []
    for count in (1, 3):
        monkeypatch.setattr(building.torch, "get_num_threads", lambda count=count: count)
        made.append(build([file], tmp_path / str(count), tokenizing()))
    assert made[0] == made[1] and texts(made[0], tmp_path / "1") == texts(made[1], tmp_path / "3")


def test_only_what_changed_is_made_again(tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = tmp_path / "data", tmp_path / "a.jsonl"
    before = set(build([write(file, [chat(n) for n in range(9)])], folder, tokenizing()).sources[0].shards)
    after = set(build([write(file, [chat(n) for n in range(11)])], folder, tokenizing()).sources[0].shards)
    assert before < after
    other = set(build([file], folder, tokenizing(taught="last")).sources[0].shards)
    assert not other & after and {path.name for path in folder.iterdir()} == other | {MANIFEST}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_shard_is_told_and_made_again(tmp_path: Path, damage: str) -> None:
    file, folder = write(tmp_path / "a.jsonl", [chat(1)]), tmp_path / "data"
    manifest = build([file], folder, tokenizing())
    shard = folder / manifest.sources[0].shards[0]
    sound = shard.read_bytes()
    shard.write_bytes({"cut": sound[:-7], "flip": sound[:-9] + b"\1" + sound[-8:], "empty": b""}[damage])
    with pytest.raises(CorruptCheckpoint, match=shard.name):
        manifest.open(folder)
    with pytest.warns(QnextWarning, match=f"{shard.name}: damaged; it is made again"):
        build([file], folder, tokenizing())
    assert shard.read_bytes() == sound


@pytest.mark.parametrize("text", ["", "{}", '{"format": "qnext-data-0"}', '{"format": "qnext-data-1", "sources": [1]}'])
def test_a_damaged_manifest_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CorruptCheckpoint, match=rf"{MANIFEST}: malformed"):
        Manifest.read(tmp_path)


def test_a_full_disk_leaves_what_was_made(tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = write(tmp_path / "a.jsonl", [chat(n) for n in range(7)]), tmp_path / "data"
    real, count = os.write, [0]

    def limited(descriptor: int, data: bytes) -> int:
        if ".partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            count[0] += 1
            if count[0] == 2:
                raise OSError(28, os.strerror(28))
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        with pytest.raises(OSError, match="No space left"):
            build([file], folder, tokenizing())
    assert {path.suffix for path in folder.iterdir()} == {".shard"}, "what was made, and neither a part nor a manifest"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build([file], folder, tokenizing()).sources[0].num_samples == 7


def test_progress_reaches_the_end(tmp_path: Path, small_units: None) -> None:
    seen: list[tuple[int, int]] = []
    files = [
        write(tmp_path / name, [chat(n + 10 * (name == "b.jsonl")) for n in range(7)])
        for name in ("a.jsonl", "b.jsonl")
    ]
    build(files, tmp_path / "data", tokenizing(), report=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (sum(file.stat().st_size for file in files),) * 2


def test_what_was_built_is_taken_without_its_sources(tmp_path: Path) -> None:
    file, folder = write(tmp_path / "a.jsonl", [chat(1)]), tmp_path / "data"
    assert built([file], folder, tokenizing()) is None
    manifest = build([file], folder, tokenizing())
    file.unlink()
    assert built([file], folder, tokenizing()) == manifest
    assert built([tmp_path / "b.jsonl"], folder, tokenizing()) is None
    assert built([file], folder, tokenizing(taught="last")) is built([file], folder, tokenizing(length=99)) is None
    (folder / manifest.sources[0].shards[0]).write_bytes(b"")
    with pytest.warns(QnextWarning, match="what is damaged is made again"):
        assert built([file], folder, tokenizing()) is None
