"""The metrics of several replicas as one text for Prometheus. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping


def merged(texts: Mapping[str, str]) -> str:
    """Each sample with the label `replica`, the name of the text that it is from; heads of families once."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                known = heads.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, replica))
    return "".join(f"{line}\n" for family in heads for line in [*heads[family], *samples.get(family, [])])


def _labelled(line: str, replica: str) -> str:
    """
    >>> _labelled('qnext_requests{status="200"} 3', 'a')
    'qnext_requests{replica="a",status="200"} 3'
    """
    name, brace, rest = line.partition("{")
    if brace:
        return f'{name}{{replica="{replica}",{rest}'
    name, _, value = line.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
