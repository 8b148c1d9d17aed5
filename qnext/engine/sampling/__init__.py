"""Logits to tokens: sampling parameters applied, windows of drafts verified, constraints kept.

Nouns: `verify` with `Window` and `Verdict`, `Constraint`, `GrammarCompiler`, `GrammarState`, `Vocabulary`. It imports
`policy`, and no model. The arithmetic of a new parameter goes into filters.py or sampler.py. A new kind of constraint
begins in constraint.py.
"""
