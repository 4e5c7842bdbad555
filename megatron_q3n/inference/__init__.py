"""Text generation with the training model: sampling, speculative decoding, continuous batching.

`generate.generate` returns finished completions, `generate.start` yields their tokens as they are generated. The
model's layers and their state are in `model/decode/forward.py` and `model/decode/state.py`.
"""
