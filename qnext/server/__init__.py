"""The HTTP face of an engine: who may ask, how much, what is written down about it, and what is counted."""
