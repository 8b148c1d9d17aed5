"""Strings to token ids and back: `Tokenizer`, `ChatFormat`, `TextStream`. No torch.

`tokenizer*.py` and `added_tokens.py` make ids, `chat.py` with `native.py` or `jinja.py` renders conversations,
`stream.py` decodes, `output/` parses what a model wrote, `train.py` trains a vocabulary, `files.py` reads texts.
Untrusted text and long work run in a child process (`*_worker.py`). Imports nothing of qnext but what every room may. A
new chat format goes into `native.py`.
"""

from __future__ import annotations
