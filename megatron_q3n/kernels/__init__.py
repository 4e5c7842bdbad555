"""Fused operations: `x.py` holds an operation's torch reference, dispatcher and autograd, `x_triton.py` its kernel."""
