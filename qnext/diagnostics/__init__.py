"""Findings about the machine, a model folder, the kernels and the experts of a model.

Nouns: `Finding`, a line for people with numbers for programs; `FolderExamination`; `LayerReport`; `ModelPlan`. May
import everything below except training. A new finding is yielded by machine.py or model.py, a new table is in
tables.py. A new kind of picture is a file here.
"""
