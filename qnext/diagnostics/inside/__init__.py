"""What happens inside a model on a text: where attention looks, what states keep, where two models part.

Nouns: InsideReport (one model), Divergence (two models). The observers add up numbers of one layer each, call after
call; `report.py` makes findings of them. It stands on `probe`. A new number is a field of a layer's report, added up in
its observer.
"""
