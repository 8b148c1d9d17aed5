"""One model trained by several processes, composed from outside: FSDP2 cuts every parameter (`fsdp.py`), a process
computes its share of the micro batches, and `RanksOfRun` (`ranks.py`) is what the training loop asks.

May import what `parallel` may. The loop's side is the protocol `TrainingRanks` in `training/ranks.py`.
"""
