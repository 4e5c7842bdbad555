"""MoE kernels: token permutation, grouped GEMMs in bf16 and FP8, SwiGLU, shared-expert gate, router GEMM."""
