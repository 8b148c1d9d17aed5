"""The readers of quantization_config, one per program that writes such folders. No torch.

`forms.py` holds the nouns (`Form`, `Rule`, `Quantization`) and the tables of what is read and what is not: a new form
begins there. Each reader turns the block of one method into a `Quantization`. `qnext.checkpoint.packed` finds which
tensors are in a folder. May import patterns, planning and errors.
"""
