"""Model: layer specs over megatron-core, the modules that fill them, and a reference implementation in plain torch."""
