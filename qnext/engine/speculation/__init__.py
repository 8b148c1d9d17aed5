"""Tokens proposed by the MTP layer, and how many of them are worth it."""
