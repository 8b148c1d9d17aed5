"""A damaged quantised folder loads to finite logits or is refused in one line: no crash, no other exception."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qnext.checkpoint import load_model
from qnext.checkpoint.quantization import read_quantization
from qnext.errors import NotSupported, QnextError, QnextWarning
from qnext.model import Batch

from .float_folders import float_folder, float_forms
from .folders import edit_config
from .packed_folders import FORMS, packed_folder, quantization_config

FLOATS = float_forms()
# Every layout of integers by its place in FORMS, and of floats by its name.
FORM_INDICES: list[int | str] = [
    0,
    3,
    5,
    6,
    7,
    9,
    "official",
    "FP8-block",
    "NVFP4",
    "ModelOpt NVFP4",
    "MXFP4",
    "nf4, nested",
    "int8",
]
ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 3, 4, 8, 16, 2**31, 2**63]),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.sampled_from(["Linear", "re:.*", "channel", "group"]),
    st.lists(st.sampled_from(["lm_head", "re:.*", "re:(", "mtp", "Linear"]), max_size=3),
)
FUZZ = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int | str, Path]:
    root = tmp_path_factory.mktemp("forms")
    for index in FORM_INDICES:
        if isinstance(index, int):
            packed_folder(root / str(index), FORMS[index])
        else:
            float_folder(root / str(index), FLOATS[index])
    return {index: root / str(index) for index in FORM_INDICES}


def config_of(index: int | str) -> dict[str, Any]:
    return quantization_config(FORMS[index]) if isinstance(index, int) else FLOATS[index].config or {}


def assert_loads_or_is_refused(folder: Path) -> None:
    try:
        model = load_model(folder)
        batch = Batch.from_lengths(torch.arange(9), [4, 5])
        with torch.no_grad():
            logits = model.logits(model(batch).hidden_TD)
    except QnextError as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    assert logits.shape == (9, model.config.vocab_size)
    assert torch.isfinite(logits).all()


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in paths_in(item, (*at, key)))]


@FUZZ
@given(data=st.data())
def test_any_quantization_config(data: st.DataObject, folders: dict[int | str, Path], tmp_path: Path) -> None:
    index = data.draw(st.sampled_from(FORM_INDICES))
    config = copy.deepcopy(config_of(data.draw(st.sampled_from([index, index, index, 0, 6, 7, "NVFP4"]))))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([path for path in paths_in(config) if path]))
        block: Any = config
        for key in path[:-1]:
            block = block[key]
        action = data.draw(st.sampled_from(["set", "remove", "add"]))
        if action == "remove":
            del block[path[-1]]
        elif action == "set" or not isinstance(block, dict):
            block[path[-1]] = data.draw(ODD_VALUES)
        else:
            block[data.draw(st.text(max_size=6))] = data.draw(ODD_VALUES)
    original = (folders[index] / "config.json").read_text()
    try:
        edit_config(folders[index], quantization_config=config)
        assert_loads_or_is_refused(folders[index])
    finally:
        (folders[index] / "config.json").write_text(original)


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@FUZZ
@given(data=st.data())
def test_any_header(data: st.DataObject, folders: dict[int | str, Path], tmp_path: Path) -> None:
    """Shapes, dtypes and names that still fit the bytes, so that the packed readers and not the header's see them."""
    source = folders[data.draw(st.sampled_from(FORM_INDICES))]
    folder = tmp_path / "m"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = sorted(name for name in header if name != "__metadata__" and ".experts." not in name)
    name = data.draw(st.sampled_from(names + [n for n in sorted(header) if ".experts.1." in n]))
    entry = header[name]
    action = data.draw(st.sampled_from(["shape", "dtype", "rename", "drop", "swap"]))
    if action == "shape":
        entry["shape"] = data.draw(
            st.sampled_from(
                [
                    entry["shape"][::-1],
                    [*entry["shape"], 1],
                    [1, *entry["shape"]],
                    [2 * s for s in entry["shape"]],
                    [2**62, 0],
                ]
            )
        )
    elif action == "dtype":
        same_size = [
            ["I32", "F32"],
            ["F16", "BF16", "I16"],
            ["I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"],
            ["I64", "F64"],
        ]
        entry["dtype"] = data.draw(st.sampled_from(next(group for group in same_size if entry["dtype"] in group)))
    elif action == "rename":
        stem = name.rpartition(".")[0]
        header[f"{stem}.{data.draw(st.sampled_from(['weight', 'qweight', 'weight_scale', 'g_idx', 'x']))}"] = entry
        header.pop(name)
    elif action == "drop":
        header.pop(name)
    else:
        other = data.draw(st.sampled_from(names))
        header[name], header[other] = header[other], header[name]
    write_header(file, header, content[8 + length :])
    assert_loads_or_is_refused(folder)


@FUZZ
@given(data=st.data())
def test_any_bytes(data: st.DataObject, folders: dict[int | str, Path], tmp_path: Path) -> None:
    """Codes may be anything; scales, shapes, zeros and indices may not."""
    source = folders[data.draw(st.sampled_from(FORM_INDICES))]
    folder = tmp_path / "m"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    marks = ("scale", "zero", "shape", "g_idx", "weight_packed", "qweight", "absmax", "map", "state", "SCB")
    names = sorted(name for name in header if any(mark in name for mark in marks))
    start, end = header[data.draw(st.sampled_from(names))]["data_offsets"]
    place = 8 + length + data.draw(st.integers(start, end - 1))
    noise = data.draw(st.sampled_from([b"\xff", b"\x00", b"\xff\x7f", b"\x80\x7f", b"\x00\x7c"]))
    content[place : place + len(noise)] = noise[: len(content) - place]
    file.write_bytes(content)
    assert_loads_or_is_refused(folder)


def test_a_key_with_a_line_break_is_named_in_one_line(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "a\nb": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.warns(QnextWarning, match="not known here") as caught:
        read_quantization(tmp_path)
    assert ["\n" in str(each.message) for each in caught] == [False]
    config["quantization_config"]["bits"] = "a\nb"  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(NotSupported, match="bits") as refused:
        read_quantization(tmp_path)
    assert "\n" not in str(refused.value)
