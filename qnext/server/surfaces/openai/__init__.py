"""OpenAI's API: chat completions, completions, responses, models; and tokenization as in vLLM.

Each API has its body (`*_bodies`), its handler and its `Writer`. May import `surfaces` and what stands below. A new
kind of tool or item goes into `foreign`.
"""
