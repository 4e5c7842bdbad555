"""Gated attention for training: the attention core, the published layer and the variants of ablations."""
