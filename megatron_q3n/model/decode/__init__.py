"""Incremental decoding: the model on new tokens of sequences, with their KV cache and recurrent state."""
