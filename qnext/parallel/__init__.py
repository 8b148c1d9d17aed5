"""One model on several ranks: who has which rows and experts, what they tell each other, and the modules that do it.

Nouns: Mesh (how many ranks, which one), RankShard (what of a parameter a rank has), ExpertPlacement (who has which
experts), Link (gathers between ranks, counted), RankWatch (whether all live), `make_sharded`, which puts shards in the
place of a model's modules. May import config, ops, planning and model. Serving cuts outputs and never the terms of a
sum. A new cut: a rule in shard.py, and a module in modules.py where ranks have to talk.
"""
