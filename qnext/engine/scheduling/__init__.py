"""Which tokens of which requests run next, and what others may share of them. Integers only."""
