"""Triton programs, one file for the programs of an op. Importing one of them imports Triton.

Nouns: none of its own. May import: Triton and forms.py beside it. A program takes addresses, strides and sizes; the
wrapper in the folder above checks shapes first. What the device's own numbers name and does not exist is neither read
nor written, and gives NaN. A new program: here, and a call in tests/ops/triton/compiled.py, which compiles it.
"""
