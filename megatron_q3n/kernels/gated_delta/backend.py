"""Which implementation of the gated delta rule runs, and why: chosen once, checked on this very
device, never by chance.

FLA's Triton backward is silently wrong on Hopper with Triton 3.4 to 3.7.0 (flash-linear-attention
issue 640), so no kernel is trusted by its version: `choose` compares its output and every gradient
with the reference before the first step, and refuses it when they differ. Which kernels there are to check is
said in `kernels/startup/delta_rule_problems.py`; that they are compiled by then is `kernels/startup/compile_ahead.py`'s concern.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.gated_delta.fla_core import without_models
from megatron_q3n.kernels.startup import compile_ahead
from megatron_q3n.kernels.startup.delta_rule_problems import DeltaRuleProblem

OPERATION = "gated delta rule"
Rule = Callable[..., tuple[Tensor, Tensor | None]]
_TOLERANCE = 2e-2  # relative, bf16 operands; a wrong kernel is off by far more than 1
_PROBLEMS = (RuntimeError, ImportError, ValueError, AssertionError, NotImplementedError)
_backend: Rule = chunk_gated_delta_rule


def gated_delta_rule(*args: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
    """Run the chosen backend; arguments and results as `chunk_gated_delta_rule`."""
    return _backend(*args, **options)  # type: ignore[arg-type]


def choose(device: torch.device, dtype: torch.dtype, problems: Sequence[DeltaRuleProblem]) -> str:
    """Choose the backend for this process, which must get every one of the problems right.

    Returns: "what: why", for environment.json.
    """
    global _backend
    _backend = chunk_gated_delta_rule
    if device.type != "cuda":
        return "torch: chunked reference, the only one without a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"torch: the fused kernels take bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("fla") is None:
        return "torch: flash-linear-attention is not installed (pip install -r requirements-gpu.txt); expect slow steps"
    try:
        _fla_rule()  # its imports take seconds, which go by while the kernels are compiled
        compile_ahead.finish()
        errors = {str(problem): gradient_error(fused_gated_delta_rule, problem, device, dtype) for problem in problems}
    except _PROBLEMS as found:
        return f"torch: the fla kernel does not run here ({type(found).__name__}: {found}); expect slow steps"
    said = ", ".join(f"{error:.1e} for {problem}" for problem, error in errors.items())
    if not all(error < _TOLERANCE for error in errors.values()):
        return f"torch: the fla kernel FAILED its gradient check on this GPU (relative error {said})"
    _backend = fused_gated_delta_rule
    registry.allow(OPERATION)
    return f"fla: gradients checked against the reference on this GPU (relative error {said})"


def fused_gated_delta_rule(
    query_BTHK: Tensor,
    key_BTHK: Tensor,
    value_BTHV: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_DHKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run flash-linear-attention's kernel, which hands on to FlashQLA where that is installed."""
    assert chunk_size == 64, "the fused kernels have a chunk of 64"
    output, state = _fla_rule()(
        query_BTHK,
        key_BTHK,
        value_BTHV,
        g=decay_BTH,
        beta=beta_BTH.to(value_BTHV.dtype),
        initial_state=initial_state_DHKV,
        output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )
    return output, state


@functools.cache
def _fla_rule() -> Callable[..., tuple[Tensor, Tensor | None]]:
    with without_models():  # late: there is no fla on a machine without a GPU
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule
    return rule


def gradient_error(candidate: Rule, problem: DeltaRuleProblem, device: torch.device, dtype: torch.dtype) -> float:
    """Return the worst relative error of output and gradients on random tokens."""
    generator = torch.Generator(device).manual_seed(0)
    bounds = None
    if problem.bounds is not None:
        bounds = torch.tensor(problem.bounds, dtype=torch.int32, device=device)

    def random(*shape: int) -> Tensor:
        whole = problem.rows, problem.tokens, *shape
        return torch.randn(*whole, generator=generator, device=device)

    q, k = (torch.nn.functional.normalize(random(problem.key_heads, problem.key_dim), dim=-1).to(dtype) for _ in "qk")
    v = random(problem.value_heads, problem.value_dim).to(dtype)
    g = -torch.nn.functional.softplus(random(problem.value_heads))
    inputs = [x.requires_grad_() for x in (q, k, v, g, random(problem.value_heads).sigmoid())]
    upstream = random(problem.value_heads, problem.value_dim).to(dtype)

    def results(rule: Rule) -> list[Tensor]:
        output, _ = rule(*inputs, cu_seqlens=bounds, output_final_state=False)
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    want = results(chunk_gated_delta_rule)
    got = results(candidate)
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(got, want)]
    return max(error.item() for error in errors)
