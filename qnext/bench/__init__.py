"""Speed beside other programs. Each contestant runs in a process of its own, and the contestants are timed in turn.

Nouns: `Contestants`, `BenchPlan`, `SpeedMeter`. May import everything below except training; peers run in their own
processes. A new peer is a file here with a `step`, and a name in plan.PEERS.
"""
