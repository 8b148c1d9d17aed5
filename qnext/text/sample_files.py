"""Files and folders of samples to JSON values, read as they are needed, each with the place that messages name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qnext.errors import UsageError, warn
from qnext.text.files import first_line, read_user_text

LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
_SAMPLES = (*LINES, ".json", *PARQUET)
_BESIDE = ("README", "LICENSE", "dataset_info")  # what lies beside the samples in a folder of them
_MAX_LINE = 64 << 20
_ROWS = 256  # of a parquet file that are in memory at once


class PlacedValue(NamedTuple):
    """A JSON value, where it stands, and how many bytes of all files have been read when it comes."""

    place: str
    value: Any
    num_bytes_read: int


def data_files(path: Path) -> list[Path]:
    """The files that a path stands for, in a fixed order.

    A folder that holds nothing but files of samples (and what describes them) stands for these. Every other folder is a
    tree of texts. Hidden files are left out. Raises UsageError where there is nothing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    relative = [(found, found.relative_to(path).parts) for found in sorted(path.rglob("*")) if found.is_file()]
    visible = [found for found, parts in relative if not any(part.startswith(".") for part in parts)]
    samples = [found for found in visible if found.suffix in _SAMPLES and not found.name.startswith(_BESIDE)]
    others = [found for found in visible if found not in set(samples) and not found.name.startswith(_BESIDE)]
    files = visible if others else samples
    if not files:
        raise UsageError(f"{path}: the folder holds no data")
    return files


def read_values(path: Path) -> Iterator[PlacedValue]:
    """The values of a file or folder, as `data_files` finds them. A text becomes `{"text": ...}`.

    In a tree, files that are empty, binary or not UTF-8 are left out with one warning that counts them. Raises
    UsageError naming file and line for what is no JSON.
    """
    files = data_files(path)
    is_tree = path.is_dir() and any(file.suffix not in _SAMPLES for file in files)
    before, left_out = 0, []
    for file in files:
        if is_tree or file.suffix not in _SAMPLES:
            try:
                text = read_user_text(file)
                yield PlacedValue(str(file), {"text": text}, before + file.stat().st_size)
            except UsageError as error:
                if not is_tree:
                    raise
                left_out.append(str(error))
        else:
            read = {".json": _json_values, ".parquet": _parquet_rows}.get(file.suffix, _json_lines)
            for place, value, num_bytes in read(file):
                yield PlacedValue(place, value, before + num_bytes)
        before += file.stat().st_size
    if left_out:
        warn(f"{path}: {len(left_out)} files are no texts and are left out, the first is {left_out[0]}")


def _json_lines(path: Path) -> Iterator[PlacedValue]:
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), start=1):
            done += len(line)
            if not line.strip():
                continue
            place = f"{path}:{number}"
            if len(line) >= _MAX_LINE:
                raise UsageError(f"{place}: longer than {_MAX_LINE >> 20} MiB")
            try:
                yield PlacedValue(place, json.loads(line), done)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{place}: not valid JSON ({first_line(error)})") from None


def _json_values(path: Path) -> Iterator[PlacedValue]:
    """A list of values, one value, or one after another, as some call a file of JSON lines."""
    text = read_user_text(path).removeprefix("\ufeff")
    decoder = json.JSONDecoder()
    is_list = text.lstrip().startswith("[")
    place = _behind_blanks(text, text.index("[") + 1 if is_list else 0)
    line, counted = 1, 0
    while place < len(text):
        line, counted = line + text.count("\n", counted, place), place
        if is_list and text[place] == "]":
            place = _behind_blanks(text, place + 1)
            if place < len(text):
                raise UsageError(f"{path}:{line + text.count(chr(10), counted, place)}: something follows the list")
            return
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{line}: not valid JSON ({first_line(error)})") from None
        yield PlacedValue(f"{path}:{line}", value, end)
        place = _behind_blanks(text, end)
        if is_list and text[place : place + 1] == ",":
            place = _behind_blanks(text, place + 1)
        elif is_list and text[place : place + 1] != "]":
            break
    if is_list:
        raise UsageError(f"{path}:{line}: the list does not end")


def _behind_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _parquet_rows(path: Path) -> Iterator[PlacedValue]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError(f"{path}: reading parquet needs pyarrow: pip install 'qnext[parquet]'") from None
    size, number = path.stat().st_size, 0
    try:
        with ParquetFile(path) as file:
            for rows in file.iter_batches(_ROWS):
                for row in rows.to_pylist():
                    number += 1
                    done = size * number // file.metadata.num_rows
                    yield PlacedValue(f"{path}: row {number}", _without_nulls(row), done)
    except ArrowException as error:
        raise UsageError(f"{path}: not a sound parquet file ({first_line(error)})") from None


def _without_nulls(value: Any) -> Any:
    """Columns and fields that other rows have are null in this one."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
