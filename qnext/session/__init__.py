"""Opens a model by its name: folder, tokenizer, chat format, weights, engine.

Nouns: `LLM`, the public Python API; `TextFolder`, a folder before its weights are read; `ServeConfig`, how a folder is
served; `RankOptions`, how a model is spread over processes; `Talk`, a conversation wherever its model runs;
`Conversation`, one with an engine in this process. May import everything below except training. Torch is loaded with
the weights, not before. A new way to open a model, or to ask one, is a file of this room.
"""
