"""Triton kernels of our own: one file per fused operation, imported only where a GPU (or Triton's interpreter) is.

Each does what a torch function of `megatron_q3n/kernels/` does and is tested against it; none of them knows the model.
Whether one runs is decided by `kernels/qualification.py`, which checks it on this very GPU first.
"""
