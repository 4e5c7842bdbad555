"""A Megatron-style training stack for Qwen3-Next-like models. Data flows one way:

    recipes/*.yaml -> config -> { data, model, parallel, metrics } -> training -> checkpoint
        -> { inference, rl } -> stages -> train
    kernels -> model        hf -> checkpoint        training -> instruments -> stages

A reader who has never seen Megatron starts at `model/reference/model.py` (the whole architecture in plain torch); one
who has starts at `model/spec.py`. `train.py` is the only entry point.
"""
