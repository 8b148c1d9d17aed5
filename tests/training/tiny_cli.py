"""The command line with the recipe `tiny`, for torchrun. `slow` is the same with a pause after every step."""

from __future__ import annotations

import time
from dataclasses import replace

from qnext.cli import main
from qnext.recipes import RECIPES, Recipe
from qnext.training import PackedStream, TrainBatch
from tests.cli.test_train import tiny_recipe

_next_batch = PackedStream.next_batch


def slow_recipe() -> Recipe:
    def next_batch(stream: PackedStream) -> TrainBatch:
        time.sleep(0.1)
        return _next_batch(stream)

    PackedStream.next_batch = next_batch  # type: ignore[method-assign]
    recipe = tiny_recipe()
    return replace(recipe, train=recipe.train.with_(total_steps=1000))


if __name__ == "__main__":
    RECIPES.update(tiny=tiny_recipe, slow=slow_recipe)
    main()
