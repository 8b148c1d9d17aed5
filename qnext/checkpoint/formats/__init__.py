"""What a quantization_config says, one reader per program that writes such folders. No torch.

`forms.py` holds the nouns and the tables of what is read and what is not: a new form begins there. Each reader turns
the block of one method into a `Quantization`; which tensors lie in a folder is `qnext.checkpoint.packed`'s question.
May import: header, patterns and errors.
"""
