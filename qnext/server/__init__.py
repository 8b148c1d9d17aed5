"""HTTP: OpenAI- and Anthropic-compatible routes over one engine, its page, its keys and its limits."""
