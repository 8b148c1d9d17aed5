"""qnext: a complete, open implementation of the Qwen3-Next architecture."""

from __future__ import annotations

__version__ = "0.1.0"
