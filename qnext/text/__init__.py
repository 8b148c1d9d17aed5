"""Strings to token ids and back: tokenizer, its training, chat formats. Nothing here needs torch."""

from __future__ import annotations
