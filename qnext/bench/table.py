"""The document of `bench` as a table for people."""

from __future__ import annotations

from typing import Any

from qnext.session.placement import CPU

_ROW = "  {:<17}{:>26}{:>26}{:>20}{:>11}{:>8}"


def format_table(document: dict[str, Any]) -> str:
    """Rates as median (least-greatest), ratios qnext over peer."""
    return "\n".join([*_head(document), *(line for scheme in document["schemes"] for line in _scheme(scheme))])


def name_of(figure: dict[str, Any]) -> str:
    """
    >>> name_of({"kind": "decode", "depth": 2048})
    'decode at 2048'
    """
    if figure["kind"] == "prefill":
        return f"prefill {figure['tokens']}"
    return f"{figure['kind']} at {figure['depth']}"


def format_ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def _head(document: dict[str, Any]) -> list[str]:
    machine, limits = document["machine"], document["limits"]
    peaks = ", ".join(
        f"{kind} {value / 1e12:.2f}" for kind, value in limits["operations_per_second"].items() if value is not None
    )
    date = f", {machine['date']}" if "date" in machine else ""
    if machine["device"] != CPU:
        known = "not known here, so no shares of them"
        if limits["source"] is not None:
            known = f"{limits['read_bytes_per_second'] / 1e9:,.0f} GB/s; Top/s of {peaks} ({limits['source']})"
        kernels = ", ".join(dict.fromkeys(scheme["kernels"] for scheme in document["schemes"]))
        name = machine.get("device_name", machine["device"])
        return [
            f"{document['model']} on {name} ({machine['device']}), kernels: {kernels}{date}",
            f"times end when the device has nothing left to do; its published limits: {known}",
        ]
    kernels = limits["native_kernels"] or "none, PyTorch computes"
    return [
        f"{document['model']} on {machine['cpu']}, {machine['threads']} threads, kernels: {kernels}{date}",
        f"this machine now: reads {limits['read_bytes_per_second'] / 1e9:.1f} GB/s; Top/s of {peaks}",
    ]


def _scheme(scheme: dict[str, Any]) -> list[str]:
    memory = scheme["memory"]
    lines = ["", f"{scheme['scheme']}, weights {_gib(memory['weight_bytes'])}"]
    lines.append(_ROW.format("", "qnext tokens/s", "", "", "bandwidth", "peak"))
    for figure in scheme["figures"]:
        bound = figure["bound"]
        bandwidth, peak = (_share(bound[name]) for name in ("share_of_bandwidth", "share_of_peak"))
        rate = _rate(figure["tokens_per_second"])
        lines.append(_ROW.format(name_of(figure), rate, "", "", bandwidth, peak))
    for ratio in scheme["within"]:
        what = f"{name_of(ratio)} over {ratio['over']}"
        lines.append(f"  {what:<30} {format_ratio(ratio['ratio'])}")
    load = scheme["load"]
    share = load["file_cache_share_before"]
    cached = "file cache unknown" if share is None else f"{share:.0%} of the files in the file cache"
    lines.append(
        f"  load to first logits {load['seconds']['median']:.2f} s, whole process "
        f"{load['process_seconds']['median']:.2f} s, {cached}"
    )
    lines.append(
        f"  peak memory {_gib(memory['peak_bytes'])}, of it {_gib(memory['peak_bytes_before'])} before loading and "
        f"{_gib(memory['cache_bytes'])} of caches; "
        f"without caches {memory['peak_without_caches_over_weights']:.2f} x weights"
        + (f"; on the host {_gib(memory['host_peak_bytes'])}" if "host_peak_bytes" in memory else "")
    )
    for peer in scheme["peers"]:
        lines.extend(_peer(peer))
    return lines


def _peer(peer: dict[str, Any]) -> list[str]:
    kind = f" {peer['type']}" if "type" in peer else ""
    lines = [f"  against {peer['peer']}{kind}, in turn"]
    lines.append(_ROW.format("", "qnext tokens/s", f"{peer['peer']} tokens/s", "ratio", "", "").rstrip())
    for figure in peer["figures"]:
        rates = (_rate(figure["tokens_per_second"]), _rate(figure["peer_tokens_per_second"]))
        lines.append(_ROW.format(name_of(figure), *rates, format_ratio(figure["ratio"]), "", "").rstrip())
    process = peer["load"]["process_seconds"]["median"]
    lines.append(f"  its process to the first token {process:.2f} s, its peak memory {_gib(peer['peak_bytes'])}")
    return lines


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['median']:.1f} ({rate['min']:.1f}-{rate['max']:.1f})"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 28 else f"{count / 2**20:.1f} MiB"
