"""Small models that differ in one thing: what is changed (`Arm`), what all get alike (`RunBudget`), and their runs.

May import what its parent may. A new ablation is an `Arm`.
"""
