"""Incremental decoding: the model on new tokens of sequences whose KV cache and recurrent state it carries."""
