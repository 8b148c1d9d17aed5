"""Prefixes that outlive their memory: entries on disk."""
