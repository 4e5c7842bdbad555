"""Gated DeltaNet kernels for training and prefill: the gated delta rule, its inputs and its output norm."""
