"""What a machine can see of the code's order: who imports whom, sizes, calls that reach past their owner.

`source.py` reads the files, `rules.py` finds what is against a rule, `debts.py` compares that with what is known and
still to be mended: one JSON file for each folder under `debts/`, which may only grow shorter.
"""
