"""Writes the digests of the commit whose interpreter runs this, one line of JSON for each."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from same_bits import house, logits, models, schedules

import torch


class Models:
    """Folders of all configurations, and the models in them once they are asked for."""

    def __init__(self, folders: dict[int, dict[str, Path]]) -> None:
        self.folders = folders
        self._loaded: dict[tuple[int, str], Any] = {}

    def get(self, index: int, form: str) -> Any:
        if (index, form) not in self._loaded:
            dtype = None if form == "int4-g32" else getattr(torch, form)
            load = house.find("load_model", "qnext.checkpoint")
            self._loaded[index, form] = load(self.folders[index][form], dtype=dtype)
        return self._loaded[index, form]

    def of_schedule(self, number: int) -> tuple[int, str]:
        """The models in turn, every form of each."""
        index = number % len(self.folders)
        forms = models.forms_of(index)
        return index, forms[number // len(self.folders) % len(forms)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--configurations", type=int, required=True)
    parser.add_argument("--schedules", type=int, required=True)
    parser.add_argument("--only-disk", action="store_true", help="schedules with a disk cache alone, and no logits")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--take", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()  # steps that fail on purpose
    pins = house.DraftPins()
    pins.install()
    with given.out.open("w", encoding="utf-8") as file:

        def write(name: str, value: Any) -> None:
            print(json.dumps({"name": name, "digest": value}), file=file, flush=True)

        write("commit", {"qnext": house.checkout()})
        folders: dict[int, dict[str, Path]] = {}
        for index in range(given.configurations):
            folders[index], made = models.make_folders(index, given.work, wants_yarn=index % 7 == 5)
            if not given.only_disk:
                vocab_size = models.random_fields(index)["vocab_size"]
                found = logits.logits_digests(index, folders[index], vocab_size, given.work)
                gradients = logits.gradient_digests(index, folders[index]["float32"])
                write(f"configuration {index}", {"files": made, "logits": found, "gradients": gradients})
        loaded = Models(folders)
        for number in range(given.schedules):
            index, form = loaded.of_schedule(number)
            run = schedules.Run(number, loaded.get(index, form), house.CLOCK, pins)
            if given.only_disk and not run.has_disk:
                continue
            found = run.digests(given.work, keep=given.keep, take=given.take)
            write(f"schedule {number} (configuration {index}, {form})", found)


if __name__ == "__main__":
    main()
