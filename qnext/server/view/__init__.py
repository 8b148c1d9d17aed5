"""The page and its live view. No torch.

`LiveHub` (live) makes ticks of the engine's work, `OwnLedger` (own_work) holds what one key may see of it, `page_files`
(files) holds the static files of `page/`. May import planning, engine, `access` and `inference`. A new panel: a file in
`page/`, and its numbers in a tick.
"""
