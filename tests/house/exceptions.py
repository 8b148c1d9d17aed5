"""What stays against a rule on purpose: rule -> offence -> the reason. One that is needed no more is taken out."""

from __future__ import annotations

from collections.abc import Mapping

EXCEPTIONS: Mapping[str, Mapping[str, str]] = {}
