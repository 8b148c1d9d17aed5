"""How long does a prompt of the full context take, how fast are answers behind it, and does memory stay as planned?

A small random hybrid model reads one prompt in chunks and decodes behind it. Printed are the speed of the first and of
the last 8,192 tokens, of decoding at that depth, and the planned bytes beside those of the process. With `--yarn 4` the
context of 262,144 tokens becomes one of 1,048,576: `--tokens 1010000`.
"""

from __future__ import annotations

import argparse

from _pair import print_json

import torch

from qnext.claims.length import NATIVE_CONTEXT, read_as_planned
from qnext.planning.machine import format_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=NATIVE_CONTEXT, help="length of the prompt (default: 262144)")
    parser.add_argument("--decode", type=int, default=32, help="tokens of the answer")
    parser.add_argument("--edge", type=int, default=8192, help="tokens at both ends of the prompt that are timed apart")
    parser.add_argument("--yarn", type=float, help="stretch the context by YaRN, 4 for 1,010,000 tokens")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = read_as_planned(
        num_tokens=options.tokens, yarn=options.yarn, num_new=options.decode, edge=options.edge, context=NATIVE_CONTEXT
    )
    print(found.pop("plan"))
    print(f"engine made in {found['start_seconds']:.2f} s")
    print(
        f"prompt {options.tokens:,} tokens in {found['prefill_seconds']:.1f} s: "
        f"{found['first_tokens_per_second']:,.0f} tokens/s at first, "
        f"{found['last_tokens_per_second']:,.0f} at last; then {found['decode_tokens_per_second']:.1f} tokens/s"
    )
    planned, grown = (format_bytes(found[name]) for name in ("planned_bytes", "grown_bytes"))
    print(f"planned beside the weights {planned}, the process grew by {grown}")
    print_json({"benchmark": "long_context", "yarn": options.yarn, **found})


if __name__ == "__main__":
    main()
