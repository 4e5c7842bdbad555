"""Attention kernels around the attention core: QKV split, query/key norms and RoPE."""
