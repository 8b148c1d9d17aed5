"""What is against a rule today and known: `python -m tests.house.debts` takes out what was mended, and adds nothing.

Each offence is known by its name, so that a new one cannot take the place of one that was mended. Who makes a rule
writes its first list by hand, or better none. What is to stay has its reason in exceptions.py.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable

from tests.house.exceptions import EXCEPTIONS
from tests.house.rules import RULES, Offences, home_of
from tests.house.source import ROOT

FOLDER = ROOT / "tests" / "house" / "debts"


def known(rule: str) -> Offences:
    found: Offences = {}
    for path in sorted(FOLDER.glob("*.json")):
        found |= json.loads(path.read_text(encoding="utf-8")).get(rule, {})
    return found


def problems(rule: str) -> list[str]:
    """What is new against a rule, and what is mended and still on the list or among the exceptions."""
    before, now, exempt = known(rule), RULES[rule](), EXCEPTIONS.get(rule, {})
    unneeded = [f"{name}: no exception is needed" for name in exempt if name not in now]
    mended = [f"{name}: mended, `python -m tests.house.debts`" for name in before if now.get(name, 0) < before[name]]
    return sorted([*added(before, without(now, exempt)), *mended, *unneeded])


def without(now: Offences, exempt: Iterable[str]) -> Offences:
    return {name: count for name, count in now.items() if name not in set(exempt)}


def added(before: Offences, now: Offences) -> list[str]:
    """Offences that are none of those before, or are more often there."""
    return [f"{name}: {now[name]}, not {before.get(name, 0)}" for name in now if now[name] > before.get(name, 0)]


def main() -> None:
    """Where a rule has an offence that is new it is told, and nothing is written."""
    files: dict[str, dict[str, Offences]] = defaultdict(lambda: defaultdict(dict))
    for rule, offences in RULES.items():
        now = without(offences(), EXCEPTIONS.get(rule, {}))
        if new := added(known(rule), now):
            sys.exit("\n  ".join([rule, *new]))
        for name in sorted(now):
            files[home_of(name)][rule][name] = now[name]
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        if path.stem not in files:
            path.unlink()
    for home, rules in files.items():
        (FOLDER / f"{home}.json").write_text(json.dumps(rules, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
