"""How good a model is: measures on texts."""

from __future__ import annotations

from qnext.eval.perplexity import EvalDocument, Perplexity, evaluate_perplexity

__all__ = ["EvalDocument", "Perplexity", "evaluate_perplexity"]
