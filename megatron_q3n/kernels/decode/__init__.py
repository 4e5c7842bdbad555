"""Decode kernels: the same layers for a few tokens per sequence, where kernel launches dominate."""
