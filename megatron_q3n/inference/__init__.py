"""Generation from the training model: sampling, speculative decoding, the loop over a batch of sequences.

`generate` returns finished completions, `stream` yields their tokens as they come. The layers, and
what they remember, are `model/decode/forward.py` and `model/decode/state.py`.
"""
