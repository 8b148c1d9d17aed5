"""Quantised weights: the layouts of other programs, and the choice of codes and scales."""
