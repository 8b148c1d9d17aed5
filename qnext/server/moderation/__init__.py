"""The operator's say about texts: a hook that judges prompts and answers. No torch.

Nouns: `ModerationQuestion` and `TextJudgement`; a `ModerationHook` over HTTP or in Python (hooks); the `Moderator`,
which asks it in time and counts. `surfaces/held.py` holds answers back until they are judged. May import
`server.errors`. Another way to ask is a class in hooks.py.
"""
