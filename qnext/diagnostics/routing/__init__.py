"""What routers decide, token by token: `RoutingRecord` is what one model chose on one text.

`pairs.py` says which experts go together, `drift.py` whether two loads differ by more than noise, `agreement.py` how
alike two models choose on the same tokens, `ablation.py` what the loss does without an expert. `show.py` prints and
`pictures.py` draws what they find. May import what `diagnostics` may. A new question about routers is a file here, and
a flag of `qnext experts`.
"""
