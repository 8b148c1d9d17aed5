"""Money and energy of a million tokens, and of a training run. No torch."""

from __future__ import annotations

from typing import Any, NamedTuple

_MILLION = 1e6
_JOULES_OF_KWH = 3.6e6


class Prices(NamedTuple):
    """Of the whole machine in an hour, and of a kilowatt-hour where energy is paid apart; `watts` of the whole machine.
    Any currency."""

    per_hour: float | None = None
    watts: float | None = None
    per_kwh: float | None = None

    @property
    def are_known(self) -> bool:
        return self.per_hour is not None or self.watts is not None


class TokenCost(NamedTuple):
    """Of a million tokens, or of a run; None where a price or the watts are not known."""

    money: float | None
    kwh: float | None

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {"money": self.money, "kwh": self.kwh}


def token_cost(prices: Prices, rate: float) -> TokenCost:
    """Where the machine does nothing else and computes `rate` tokens a second.

    >>> token_cost(Prices(per_hour=3.6, watts=700, per_kwh=0.1), 1000)
    TokenCost(money=1.0194444444444444, kwh=0.19444444444444445)
    """
    return run_cost(prices, _MILLION / rate)


def run_cost(prices: Prices, seconds: float) -> TokenCost:
    """Of a machine that runs for so long."""
    kwh = None if prices.watts is None else prices.watts * seconds / _JOULES_OF_KWH
    money = None if prices.per_hour is None else prices.per_hour * seconds / 3600
    if kwh is not None and prices.per_kwh is not None:
        money = (money or 0.0) + kwh * prices.per_kwh
    return TokenCost(money, kwh)
