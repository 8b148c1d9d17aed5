"""The APIs. A surface turns its body into a conversation and its answer into the events of its clients.

`Dialogue` (dialogue) is a rendered conversation, `Offer` (tools) the tools of a request. `open_answers` (opening)
begins, an `AnswerReader` (answers) reads tokens as text and calls, a `Writer` (writing) makes a surface's events. May
import `exchange` and what stands below. A new API: a folder beside `openai` and `anthropic`, routes in `table.py`.
"""
