"""Native CPU kernels: the wrappers check shapes, types and memory layout, then pass addresses on.

Every function here has a counterpart of the same meaning in ops/reference. They take fp32 activations, contiguous, on
the CPU, and give no gradients. `qnext.ops` decides who is called; see qnext.ops.backend.
"""
