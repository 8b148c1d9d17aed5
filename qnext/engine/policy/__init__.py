"""Policy: integers only, no torch, so that it is tested in milliseconds.

Nouns: `Request` and its `Sequence`, `SamplingParams`, `StepPlan`, `Scheduler`, its queue (`Turns`), what owners may
hold (`Shares`) and what prefixes share (`PrefixCache`), `DraftLengths`, and what a failed step means (`Recovery`). It
imports no other folder of the engine. A new rule about who runs, waits or yields goes here.
"""
