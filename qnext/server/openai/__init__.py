"""OpenAI's surface: chat completions, completions, responses, models."""
