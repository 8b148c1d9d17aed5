"""Whole training runs as functions that return a `Recipe`: a model, a corpus, a tokenizer, a `TrainConfig`.

`recipe.py` prepares and runs one. `code.py` holds those that train on Python code. May import everything below, but not
bench, client or diagnostics. A new run is a new function here, and a name in `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable

from qnext.errors import UsageError, did_you_mean
from qnext.recipes.code import demo, micro_code, small_code
from qnext.recipes.recipe import Recipe, override

RECIPES: dict[str, Callable[[], Recipe]] = {"small-code": small_code, "micro-code": micro_code}


def recipe(name: str) -> Recipe:
    """The recipe called `name`; UsageError lists the known names."""
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}; known: {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "Recipe", "demo", "override", "recipe"]
