"""Which experts should stay in memory? Hit rates of policies, on synthetic traces and on a trace of a real model.

Beside the policy of qnext.residency with several half lives stand LRU, LFU, the experts that are most used in the first
half of the trace (pinned), and the best that is possible (Belady, who knows what comes). `--trace FILE` reads a routing
trace as BigMoeOnEdge writes them: CSV with the columns turn, step, layer and expert, a line for each expert of a token.
"""

from __future__ import annotations

import argparse
import collections
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from _pair import print_json

from qnext.residency.policy import ResidentSet
from qnext.residency.traces import PRESETS, RoutingTrace

Rows = list[list[int]]
Hits = Callable[[Rows, int], list[int]]  # rows and slots -> hits of each row


def decayed(half_life: int, num_experts: int) -> Hits:
    def hits(rows: Rows, slots: int) -> list[int]:
        residents = ResidentSet(num_experts, slots, half_life=half_life)
        return [residents.use(row, [1] * len(row), num_tokens=1) for row in rows]

    return hits


def least_recently_used(rows: Rows, slots: int) -> list[int]:
    cache: collections.OrderedDict[int, None] = collections.OrderedDict()
    found = []
    for row in rows:
        found.append(sum(expert in cache for expert in row))
        for expert in row:
            cache[expert] = None
            cache.move_to_end(expert)
        while len(cache) > slots:
            cache.popitem(last=False)
    return found


def least_frequently_used(rows: Rows, slots: int) -> list[int]:
    uses: collections.Counter[int] = collections.Counter()
    cache: set[int] = set()
    found = []
    for row in rows:
        found.append(sum(expert in cache for expert in row))
        uses.update(row)
        cache |= set(row)
        while len(cache) > slots:
            cache.remove(min(cache, key=lambda expert: (uses[expert], expert)))
    return found


def pinned(rows: Rows, slots: int) -> list[int]:
    uses = collections.Counter(expert for row in rows[: len(rows) // 2] for expert in row)
    cache = {expert for expert, _ in uses.most_common(slots)}
    return [sum(expert in cache for expert in row) for row in rows]


def best_possible(rows: Rows, slots: int) -> list[int]:
    """Belady: whoever is needed last goes, or is not even kept."""
    coming: dict[int, list[int]] = collections.defaultdict(list)
    for number in range(len(rows) - 1, -1, -1):
        for expert in rows[number]:
            coming[expert].append(number)
    cache: set[int] = set()
    found = []
    for row in rows:
        found.append(sum(expert in cache for expert in row))
        for expert in row:
            coming[expert].pop()
        cache |= set(row)
        while len(cache) > slots:
            cache.remove(max(cache, key=lambda expert: coming[expert][-1] if coming[expert] else len(rows)))
    return found


def read_trace(path: Path) -> Iterator[tuple[str, int, Rows]]:
    """Each layer of a CSV file, with the number of its experts."""
    layers: dict[int, dict[tuple[int, int], list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    with path.open(newline="") as file:
        for line in csv.DictReader(row for row in file if not row.startswith("#")):
            token = int(line["turn"]), int(line["step"])
            layers[int(line["layer"])][token].append(int(line["expert"]))
    for layer, tokens in sorted(layers.items()):
        rows = [sorted(tokens[token]) for token in sorted(tokens)]
        yield f"layer {layer}", 1 + max(max(row) for row in rows), rows


def synthetic(num_tokens: int) -> dict[str, list[tuple[int, Rows]]]:
    """An early layer and a later one of each preset."""
    return {
        preset: [
            (512, RoutingTrace(preset, num_experts=512, top_k=10, layer=layer).take(num_tokens).tolist())
            for layer in (0, 9)
        ]
        for preset in PRESETS
    }


def warm_rate(layers: list[tuple[int, Rows]], share: float, hits: Hits) -> float:
    """Of the second half of the traces: the first one warms."""
    found = [sum(hits(rows, int(share * count))[len(rows) // 2 :]) for count, rows in layers]
    return sum(found) / sum(len(row) for _, rows in layers for row in rows[len(rows) // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--slots", type=float, nargs="+", default=[0.18, 0.36, 0.5], help="shares of all experts")
    parser.add_argument("--half-lives", type=int, nargs="+", default=[16, 64, 256, 1024])
    options = parser.parse_args()
    sets = synthetic(options.tokens)
    if options.trace is not None:
        sets = {options.trace.name: [(count, rows) for _, count, rows in read_trace(options.trace)]}
    others = {"LRU": least_recently_used, "LFU": least_frequently_used, "pinned": pinned, "Belady": best_possible}
    results = []
    for name, layers in sets.items():
        policies: dict[str, Hits] = {f"half life {h}": decayed(h, layers[0][0]) for h in options.half_lives}
        for share in options.slots:
            rates = {policy: warm_rate(layers, share, hits) for policy, hits in {**policies, **others}.items()}
            results.append({"trace": name, "share": share, "hit_rates": rates})
            figures = "  ".join(f"{policy} {rate:.1%}" for policy, rate in rates.items())
            print(f"{name:<28} {share:.0%}  {figures}", flush=True)
    print_json({"results": results})


if __name__ == "__main__":
    main()
