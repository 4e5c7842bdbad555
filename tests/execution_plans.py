"""Execution plans for tests: fused kernels inside a whole model, on a GPU or in Triton's interpreter on a CPU.

The rules allow fused kernels in bf16 on a GPU only. A test may also run them in fp32 and on a CPU: `fused_plan` applies
the rules as on such a GPU, and `use_plan` puts the result into a model that is already built.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megatron_q3n.config import RunConfig
from megatron_q3n.config.execution_plan import ExecutionPlan, Hardware, Kernel, KernelStatus
from megatron_q3n.config.execution_rules import execution_plan

DECODE_KERNELS = frozenset(kernel for kernel in Kernel if kernel.name.startswith("DECODE_"))
# flash-linear-attention's rule needs a GPU, as do products of e4m3, and shapes that the grouped GEMM does not support
INTERPRETED_KERNELS = frozenset(Kernel) - {Kernel.GATED_DELTA_RULE, Kernel.GROUPED_GEMM, Kernel.FP8_EXPERTS}
MODULES = {
    "gated_delta.mixer_inputs_triton": Kernel.GATED_DELTA_MIXER,
    "attention.qkv_norm_rope_triton": Kernel.QKV_NORM_ROPE,
    "residual_norm_triton": Kernel.RESIDUAL_NORM,
    "moe.permutation_triton": Kernel.PERMUTATION,
    "moe.expert_exchange_triton": Kernel.EXPERT_EXCHANGE,
    "moe.grouped_gemm_triton": Kernel.GROUPED_GEMM,
    "moe.swiglu_triton": Kernel.SWIGLU,
    "moe.shared_expert_gate_triton": Kernel.SHARED_EXPERT_GATE,
    "moe.fp8_quantize_triton": Kernel.FP8_EXPERTS,
    "decode.gemm_triton": Kernel.DECODE_GEMM,
    "decode.attention_triton": Kernel.DECODE_ATTENTION,
    "decode.router_triton": Kernel.DECODE_ROUTER,
    "decode.experts_triton": Kernel.DECODE_EXPERTS,
    "decode.argmax_triton": Kernel.DECODE_ARGMAX,
    "decode.gated_delta_triton": Kernel.DECODE_GATED_DELTA,
}


def fused_plan(config: RunConfig, kernels: Collection[Kernel]) -> ExecutionPlan:
    """Return the plan of a process in which exactly these kernels are qualified, whatever the device and the dtype.

    What else depends on the device (CUDA graphs, grouped GEMMs without a kernel, attention's core) stays as it is here.
    """
    status = KernelStatus(frozenset(kernels))
    bf16 = config.precision.model_copy(update={"compute": "bf16"})
    fused = execution_plan(config.model_copy(update={"precision": bf16}), Hardware("cuda", "torch", status))
    if torch.cuda.is_available():
        here = execution_plan(config, Hardware("cuda", "transformer_engine", status))
    else:
        here = execution_plan(config, Hardware("cpu", "torch", status))
    moe = fused.moe
    if not moe.grouped_gemm:
        gemm = here.moe.grouped_gemm, here.moe.grouped_gemm_backend
        moe = replace(moe, grouped_gemm=gemm[0], grouped_gemm_backend=gemm[1])
    attention = replace(
        fused.gated_attention, core=here.gated_attention.core, masked_gqa=here.gated_attention.masked_gqa
    )
    decode = replace(fused.decode, cuda_graph=here.decode.cuda_graph)
    return replace(fused, gated_attention=attention, moe=moe, decode=decode, training_step=here.training_step)


@contextmanager
def use_plan(model: Any, plan: ExecutionPlan) -> Iterator[None]:
    """Run all modules of a model by another plan inside the context.

    Several modules (routers, shared experts, attention variants) hold copies of the TransformerConfig. A generation
    reads its plan when it is started; a CUDA graph keeps the kernels with which it was captured.
    """
    modules = [module for module in model.modules() if hasattr(getattr(module, "config", None), "plan")]
    configs = {id(module.config): module.config for module in modules}
    before = {key: config.plan for key, config in configs.items()}
    for config in configs.values():
        config.plan = plan
    try:
        yield
    finally:
        for key, config in configs.items():
            config.plan = before[key]


@contextmanager
def launched_kernels() -> Iterator[set[Kernel]]:
    """Yield the set of fused kernels that are launched inside the context, except the delta rule's."""
    from triton.runtime.interpreter import GridExecutor  # late
    from triton.runtime.jit import JITFunction

    launched: set[Kernel] = set()

    def record(launcher: Any) -> None:
        kernel = MODULES.get(launcher.fn.__module__.removeprefix("megatron_q3n.kernels."))
        if kernel is not None:
            launched.add(kernel)

    interpret, run = GridExecutor.__call__, JITFunction.run

    def recorded_interpret(grid: Any, *arguments: Any, **options: Any) -> Any:
        record(grid)
        return interpret(grid, *arguments, **options)

    def recorded_run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        if not options.get("warmup"):
            record(kernel)
        return run(kernel, *arguments, **options)

    GridExecutor.__call__, JITFunction.run = recorded_interpret, recorded_run
    try:
        yield launched
    finally:
        GridExecutor.__call__, JITFunction.run = interpret, run
