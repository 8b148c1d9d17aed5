"""Quantised weights: which parameters get which scheme, their codes and scales, the layouts on disk, the quality
report.

Nouns: QuantScheme, QuantPolicy, LayerQuantizer, QualityReport. May import config, ops, planning and model. A new scheme
is a line in scheme.py. A new way to choose codes is a function in rounding.py. A layout of another program is a
function in formats.py (codes) or float_formats.py (numbers), and a line in checkpoint/formats/forms.py.
"""
