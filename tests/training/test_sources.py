from __future__ import annotations

from pathlib import Path

import pytest

from qnext.errors import UsageError
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import END_OF_TEXT, byte_level_tokenizer
from qnext.training.sources import TextFile, collect, split_by_package, take_bytes, tokenize


def test_collect(tmp_path: Path) -> None:
    contents = {
        "one.py": b"x = 1\n",
        "pkg/two.py": "é = 2\n".encode(),
        "pkg/sub/three.py": b"x = 3\n",
        "pkg/note.txt": b"no",
        "pkg/tests/four.py": b"x = 4\n",
        "copy.py": b"x = 3\n",
        "bad.py": b"\xff",
        "empty.py": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    files, num_left_out = collect(tmp_path, suffixes=(".py",), skip_folders=("tests",))
    assert [(f.name, f.package) for f in files] == [("copy.py", "copy"), ("one.py", "one"), ("pkg/two.py", "pkg")]
    assert num_left_out == 3
    with pytest.raises(UsageError, match=r"no readable \.rst"):
        collect(tmp_path, suffixes=(".rst",))
    with pytest.raises(UsageError, match="no such folder"):
        collect(tmp_path / "nowhere", suffixes=(".py",))


def test_a_package_is_never_cut_and_never_moves() -> None:
    files = [TextFile(f"p{i}/{j}.py", f"p{i}", "text") for i in range(200) for j in range(3)]
    train, held_out = split_by_package(files, held_out_share=0.2)
    assert not {f.package for f in train} & {f.package for f in held_out}
    assert 0.1 < len(held_out) / len(files) < 0.3
    fewer = split_by_package(files[:300], held_out_share=0.2)[1]
    assert {f.package for f in fewer} == {f.package for f in held_out} & {f.package for f in files[:300]}
    assert split_by_package(files, held_out_share=0.2, salt="other")[1] != held_out


def test_take_bytes() -> None:
    files = [TextFile(str(i), "p", "é" * 10) for i in range(9)]
    taken = take_bytes(files, limit=65)
    assert len(taken) == 3
    assert taken == take_bytes(list(reversed(files)), limit=65)
    assert len(take_bytes(files, limit=1)) == 1


def test_tokenize_ends_documents_and_keeps_names_of_control_tokens_as_text() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer(), eos_tokens=[END_OF_TEXT])
    (end_id,) = tokenizer.eos_ids
    text = f"a {END_OF_TEXT} b"
    (document,) = tokenize([text], tokenizer, end_id=end_id)
    assert document.tolist().count(end_id) == 1 and document[-1] == end_id
    assert tokenizer.decode(document[:-1].tolist()) == text


def test_a_batch_of_texts_is_encoded_as_one_by_one() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer(), eos_tokens=[END_OF_TEXT])
    texts = ["a b\n\n  c", "", "e\u0301 " + END_OF_TEXT, "def f(x):\n\treturn 1"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    with pytest.raises(UsageError, match="surrogate"):
        tokenizer.encode_batch(["fine", "\ud800"])
