"""Request bodies: JSON bytes become a strict pydantic model. Every field is used, refused, or named as without effect.

`parse_body` (parsing), `check_keys` (double_keys), `Body` and `SamplingBody` (strict), `review` (foreign_fields). May
import `errors`, `limits`, `lanes`, the engine's parameters and text; no handler. A new parameter of sampling:
`SamplingBody`, then `surfaces/sampling.py`. A field without effect: `foreign_fields`.
"""
