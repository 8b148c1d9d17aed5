"""Triton programs, one file for the programs of an op. Importing one of them imports Triton.

Nouns: none of its own. May import: nothing but Triton. A program takes addresses, strides and sizes and checks nothing;
the wrapper in the folder above checks first. A new program: here, and a line in tests/ops/triton/test_compile.py, which
compiles it for a GPU that need not be there.
"""
