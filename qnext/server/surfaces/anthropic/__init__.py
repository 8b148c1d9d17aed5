"""Anthropic's API: messages and the count of their tokens. A body, a conversation, tools, a handler with its `Writer`.

May import `surfaces` and what stands below. A new kind of content block goes into `bodies` and `conversation`.
"""
