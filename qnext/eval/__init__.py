"""Measures of the quality of a model: on texts, on generated problems, on documents.

Nouns: `EvalDocument`, `Perplexity`; `Interval`; problems of token ids (ids), tasks in words (tasks), questions about
documents (docs). May import config, quant, model, engine and text. A new measure is a file with a frozen result.
"""

from __future__ import annotations

from qnext.eval.perplexity import EvalDocument, Perplexity, evaluate_documents, evaluate_perplexity

__all__ = ["EvalDocument", "Perplexity", "evaluate_documents", "evaluate_perplexity"]
