"""From logits to tokens: parameters applied, windows of drafts verified, constraints kept."""
