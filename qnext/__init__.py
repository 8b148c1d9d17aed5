"""qnext: a complete, open implementation of the Qwen3-Next architecture.

`from qnext import LLM, SamplingParams` is the way in; nothing heavy is loaded before a name is used.
"""

from __future__ import annotations

from qnext.openmp import bound_spinning
from qnext.version import __version__ as __version__

TYPE_CHECKING = False  # as in typing, whose import takes time
if TYPE_CHECKING:
    from qnext.engine import SamplingParams as SamplingParams
    from qnext.session.llm import LLM as LLM

bound_spinning()


def __getattr__(name: str) -> object:
    from qnext.lazy import lazy_names

    return lazy_names(__name__, {"LLM": "session.llm", "SamplingParams": "engine"})(name)
