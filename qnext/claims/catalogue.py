"""The claims: what was published, where, and which number decides. A new claim is a line here."""

from __future__ import annotations

from qnext.claims.claim import Claim, Limit, Script
from qnext.claims.counts import Counting

_BLOG = "Qwen, announcement of Qwen3-Next, September 2025"
_CARD = "model card of Qwen3-Next-80B-A3B"

C1 = Script(
    "C1",
    "Sizes",
    "79.67 B without and 81.3 B with MTP; 3.25 B active without the head, 3.56 B with it: 4.1 %, not 3.7 %.",
    "All the way: it is arithmetic on the published configuration.",
    short=Counting(("80b-a3b",)),
    long=Counting(("80b-a3b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b")),
)
SCRIPTS = (C1,)

CLAIMS = (
    Claim("parameters in all, in billions", _CARD, C1, "total_billion", Limit(79.5, 80.5), "80"),
    Claim("active parameters of a token, in billions", _CARD, C1, "active_billion", Limit(2.5, 3.5), "3"),
    Claim("active share in percent", _BLOG, C1, "active_percent", Limit(3.65, 3.75), "3.7"),
)
