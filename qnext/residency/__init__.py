"""Experts that do not fit into memory: which of them are there, who leaves, and how the others are read.

Nouns: ResidentSet, the experts of one layer that stay (integers, the definition of what the kernels do); HostedExperts,
the experts of one layer on the host, and DeviceSlots, which of them a device has; CopiesAhead, guessed experts.
May touch: ops, planning. It knows no folder of a model and no engine.
A new policy: policy.py, and the same in ops/cpu/src/residency.cpp; tests/residency compares the two.
"""
