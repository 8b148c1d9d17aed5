"""The definition of every op in plain PyTorch: differentiable, packed, with carried state."""
