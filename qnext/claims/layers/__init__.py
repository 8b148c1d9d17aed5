"""Single layers in the shapes of the released models, at any depth of context: how fast they are, and whole models made
of them by arithmetic.

Nouns: `LayerFolders` has the weights, `layers_worker` times them in a process of its own, `LayerTimes` adds them up.
May import what its parent may. A new shape is a line of `shapes.py`.
"""
