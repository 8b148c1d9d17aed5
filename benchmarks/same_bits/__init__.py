"""What two commits compute, as digests that can be compared.

`_produce_bits.py` runs in the interpreter of either commit, unchanged. `house.py` alone knows what their names and
forms differ in: a name that moves gets another line there. `models.py` makes random models, `logits.py` and
`schedules.py` digest what becomes of them, `compare.py` names the first difference.
"""
