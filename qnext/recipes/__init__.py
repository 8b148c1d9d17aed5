"""Whole training runs as functions. `recipe.py` prepares a `Recipe` (pretraining), `tuning.py` a `TuningTask`
(fine-tuning), for which a `Method` (sft, dpo, distill, on_policy) or `gspo.py` says how. `reason.py` joins all stages.

May import everything below, but not bench, client or diagnostics. A new pretraining run is a function in `code.py` and
a name in `RECIPES`; a new way of fine-tuning is a `Method` and a line in `tasks.py`.
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
