"""The published claims about the architecture, each run here and judged by what was measured.

Nouns: `Claim` is a sentence with the number that decides it, `Script` the experiment behind some of them, `Notebook`
what was measured. `catalogue.py` lists the claims and `scripts.py` their experiments; `report.py` and `page.py` write
them up; `layers/` times released shapes, `training/` trains small models. May import everything below, training and
recipes included. A new claim is a line of the catalogue.
"""
