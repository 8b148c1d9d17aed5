"""lm-evaluation-harness on qnext: a model of this process or a server, and the announcement's tables as commands.

Nouns: `HarnessModel` and `ServedCompletions` are what the harness asks; `HarnessRun` says what is asked; `PublishedRow`
is a published figure with its settings. May import session and all below. lm-eval is an extra
(`pip install 'qnext[eval]'`), so modules that import it are imported where they are used. A new row is a line of
tables.py.
"""
