"""Measures of the quality of a model on texts.

Nouns: `EvalDocument`, `Perplexity`. May import config, model, engine and text. A new measure is a file with a frozen
result.
"""

from __future__ import annotations

from qnext.eval.perplexity import EvalDocument, Perplexity, evaluate_perplexity

__all__ = ["EvalDocument", "Perplexity", "evaluate_perplexity"]
