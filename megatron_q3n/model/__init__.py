"""The model: layer specs over megatron-core, our own modules in them, and the whole architecture in plain torch."""
