"""Qualification of the gated delta rule's fused kernel: output and every gradient against the reference, on this GPU.

The shapes to check are listed by `delta_rule_problems.py`; `compile_ahead.py` compiles the kernels beforehand.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_q3n.config.execution_plan import Kernel
from megatron_q3n.kernels import registry
from megatron_q3n.kernels.gated_delta.backend import Rule, fla_rule, fused_gated_delta_rule
from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.startup import compile_ahead
from megatron_q3n.kernels.startup.delta_rule_problems import DeltaRuleProblem
from megatron_q3n.packing import Packing

# relative, for bf16 operands; the error of a wrong kernel is far above 1
_TOLERANCE = 2e-2
_KERNEL_ERRORS = (RuntimeError, ImportError, ValueError, AssertionError, NotImplementedError)


def check_delta_rule(device: torch.device, dtype: torch.dtype, problems: Sequence[DeltaRuleProblem]) -> str:
    """Qualify the fused kernel if it solves every problem correctly, else record why it may not run.

    Returns: "backend: reason", for environment.json.
    """
    if device.type != "cuda":
        return _refuse("chunked reference, the only one without a GPU")
    if dtype not in (torch.bfloat16, torch.float16):
        return _refuse(f"the fused kernels take bf16 or fp16, not {str(dtype).removeprefix('torch.')}")
    if importlib.util.find_spec("fla") is None:
        return _refuse(
            "flash-linear-attention is not installed (pip install -r requirements-gpu.txt); expect slow steps"
        )
    try:
        # its imports take seconds, during which the helper compiles the kernels
        fla_rule()
        compile_ahead.finish()
        errors = {str(problem): gradient_error(fused_gated_delta_rule, problem, device, dtype) for problem in problems}
    except _KERNEL_ERRORS as exception:
        return _refuse(f"the fla kernel does not run here ({type(exception).__name__}: {exception}); expect slow steps")
    summary = ", ".join(f"{error:.1e} for {problem}" for problem, error in errors.items())
    if not all(error < _TOLERANCE for error in errors.values()):
        return _refuse(f"the fla kernel FAILED its gradient check on this GPU (relative error {summary})")
    registry.allow(Kernel.GATED_DELTA_RULE)
    return f"fla: gradients checked against the reference on this GPU (relative error {summary})"


def _refuse(reason: str) -> str:
    registry.refuse(Kernel.GATED_DELTA_RULE, reason)
    return f"torch: {reason}"


def gradient_error(candidate: Rule, problem: DeltaRuleProblem, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error of output and gradients on random tokens."""
    generator = torch.Generator(device).manual_seed(0)
    packing = None if problem.bounds is None else Packing.of(problem.bounds, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(problem.rows, problem.tokens, *shape, generator=generator, device=device)

    q, k = (torch.nn.functional.normalize(random(problem.key_heads, problem.key_dim), dim=-1).to(dtype) for _ in "qk")
    v = random(problem.value_heads, problem.value_dim).to(dtype)
    g = -torch.nn.functional.softplus(random(problem.value_heads))
    inputs = [x.requires_grad_() for x in (q, k, v, g, random(problem.value_heads).sigmoid())]
    upstream = random(problem.value_heads, problem.value_dim).to(dtype)

    def results(rule: Rule) -> list[Tensor]:
        output, _ = rule(*inputs, packing=packing, output_final_state=False)
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    expected = results(chunk_gated_delta_rule)
    actual = results(candidate)
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(actual, expected)]
    return max(error.item() for error in errors)
