"""The claims: what was published, where, and which number decides. A new claim is a line here."""

from __future__ import annotations

from qnext.claims.claim import Claim, Limit
from qnext.claims.scripts import C1, C2, C3, C4, C5, C6, C7, C8, C9, C10
from qnext.claims.training.domains import DOMAINS

_BLOG = "Qwen, announcement of Qwen3-Next, September 2025"
_CARD = "model card of Qwen3-Next-80B-A3B"
_RULER = f"{_CARD}, RULER"
CLAIMS = (
    Claim("parameters in all, in billions", _CARD, C1, "total_billion", Limit(79.5, 80.5), "80"),
    Claim("active parameters of a token, in billions", _CARD, C1, "active_billion", Limit(2.5, 3.5), "3"),
    Claim("active share in percent", _BLOG, C1, "active_percent", Limit(3.65, 3.75), "3.7"),
    Claim(
        "training compute over Qwen3-32B's, percent", _BLOG, C2, "percent_of_qwen3-32b", Limit(high=9.3), "9.3 (hours)"
    ),
    Claim("over Qwen3-30B-A3B's, percent", _BLOG, C2, "percent_of_qwen3-30b-a3b", Limit(high=80.0), "under 80 (hours)"),
    Claim("prefill over Qwen3-32B's at 4K", _BLOG, C3, "prefill_short", Limit(low=7.0), "about 7x"),
    Claim("at 32K", _BLOG, C3, "prefill_medium", Limit(low=10.0), "over 10x"),
    Claim("at 128K", _BLOG, C3, "prefill_long", Limit(low=10.0), "over 10x"),
    Claim("decoding over Qwen3-32B's at 4K, one sequence", _BLOG, C4, "decode_alone_short", Limit(low=4.0), "about 4x"),
    Claim("at 32K, one sequence", _BLOG, C4, "decode_alone_medium", Limit(low=10.0), "over 10x"),
    Claim("at 128K, one sequence", _BLOG, C4, "decode_alone_long", Limit(low=10.0), "over 10x"),
    Claim("at 4K, eight sequences", _BLOG, C4, "decode_together_short", Limit(low=4.0), "about 4x"),
    Claim("at 32K, eight sequences", _BLOG, C4, "decode_together_medium", Limit(low=10.0), "over 10x"),
    Claim("at 128K, eight sequences", _BLOG, C4, "decode_together_long", Limit(low=10.0), "over 10x"),
    Claim(
        "loss of hybrid less that of full attention, bits per byte",
        _BLOG,
        C5,
        "loss_minus_full",
        Limit(high=0.0),
        "better",
    ),
    Claim("loss of hybrid less that of linear attention", _BLOG, C5, "loss_minus_linear", Limit(high=0.0), "better"),
    Claim("recall of hybrid less that of full attention", _BLOG, C5, "recall_minus_full", Limit(low=0.0), "better"),
    Claim("recall of hybrid less that of linear attention", _BLOG, C5, "recall_minus_linear", Limit(low=0.0), "better"),
    Claim(
        "first-token mass with the gate over that without, full attention",
        "arXiv:2505.06708",
        C6,
        "first_token_mass_full",
        Limit(high=1.0),
        "0.10 (4.8 % over 46.7 %)",
    ),
    Claim("the same in the hybrid", "arXiv:2505.06708", C6, "first_token_mass_hybrid", Limit(high=1.0), "not given"),
    Claim(
        "largest activation with the gate over that without, full attention",
        "arXiv:2505.06708",
        C6,
        "largest_full",
        Limit(high=1.0),
        "0.09 (94 over 1,053)",
    ),
    Claim("the same in the hybrid", "arXiv:2505.06708", C6, "largest_hybrid", Limit(high=1.0), "not given"),
    Claim(
        "loss for each doubling of the experts, bits per byte",
        _BLOG,
        C7,
        "loss_of_a_doubling",
        Limit(high=0.0),
        "falls",
    ),
    Claim(
        "loss with balance of the step less that with balance of micro batches",
        "arXiv:2501.11873",
        C7,
        "loss_step_minus_micro",
        Limit(high=0.0),
        "lower (perplexity 8.17 to 8.04)",
    ),
    Claim("evenness of the experts: entropy of their load", _BLOG, C7, "load_entropy", Limit(low=0.95), "even"),
    *(
        Claim(
            f"speed with drafts over that without, {domain}, behind few tokens",
            _BLOG,
            C8,
            f"speed_{domain}_first",
            Limit(low=1.0),
            "higher",
        )
        for domain in DOMAINS
    ),
    *(
        Claim(
            f"the same of the released model by its layers, one draft, acceptance of the small one, {domain}",
            _BLOG,
            C8,
            f"released_{domain}",
            Limit(low=1.0),
            "higher",
        )
        for domain in DOMAINS
    ),
    Claim(
        "a token of a linear layer behind 1M tokens over one behind 1K",
        _BLOG,
        C9,
        "linear_last_over_first",
        Limit(high=1.05),
        "O(n)",
    ),
    Claim("tokens of one prompt, by YaRN", _CARD, C9, "prompt_tokens", Limit(low=1_010_000), "1,010,000"),
    Claim(
        "memory of that prompt over what was planned",
        "this program's plan",
        C9,
        "grown_over_planned",
        Limit(high=1.0),
        "-",
    ),
    Claim(
        "recall at twice the length over that at the trained one",
        _RULER,
        C10,
        "kept_at_2x",
        Limit(low=0.95),
        "98.5 to 93.5 % from 4K to 256K",
    ),
    Claim("at four times the length", _RULER, C10, "kept_at_4x", Limit(low=0.95), "80.3 % at 1M, by YaRN"),
)
