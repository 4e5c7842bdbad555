"""Which implementation of the gated delta rule runs, and why: chosen once, checked on this very
device, never by chance.

FLA's Triton backward is silently wrong on Hopper with Triton 3.4 to 3.7.0 (flash-linear-attention
issue 640), so no kernel is trusted by its version: `choose` compares its output and every gradient
with the reference before the first step, and refuses it when they differ.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_q3n.kernels import choices
from megatron_q3n.kernels.delta_mixer import DeltaHeads
from megatron_q3n.kernels.gated_delta_rule import chunk_gated_delta_rule

OPERATION = "gated delta rule"
Rule = Callable[..., tuple[Tensor, Tensor | None]]
_TOLERANCE = 2e-2  # relative, bf16 operands; a wrong kernel is off by far more than 1
_backend: Rule = chunk_gated_delta_rule


def gated_delta_rule(*args: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
    """Run the chosen backend; arguments and results as `chunk_gated_delta_rule`."""
    return _backend(*args, **options)  # type: ignore[arg-type]


def choose(device: torch.device, dtype: torch.dtype, heads: DeltaHeads, packed: bool) -> str:
    """Choose the backend for this process.

    Returns: "what: why", for environment.json.
    """
    global _backend
    _backend = chunk_gated_delta_rule
    if device.type != "cuda":
        return "torch: chunked reference, the only one without a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return (
            f"torch: the fused kernels take bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
        )
    if importlib.util.find_spec("fla") is None:
        return "torch: flash-linear-attention is not installed (pip install -r requirements-gpu.txt); expect slow steps"
    try:
        error = _gradient_error(fused_gated_delta_rule, device, dtype, heads, packed)
    except (RuntimeError, ImportError, ValueError, AssertionError, NotImplementedError) as problem:
        return f"torch: the fla kernel does not run here ({type(problem).__name__}: {problem}); expect slow steps"
    if not error < _TOLERANCE:
        return f"torch: the fla kernel FAILED its gradient check on this GPU (relative error {error:.1e})"
    _backend = fused_gated_delta_rule
    choices.allow(OPERATION)
    return f"fla: gradients checked against the reference on this GPU (relative error {error:.1e})"


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
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla_rule  # late: imports Triton

    assert chunk_size == 64, "the fused kernels have a chunk of 64"
    output, state = fla_rule(
        query_BTHK, key_BTHK, value_BTHV, g=decay_BTH, beta=beta_BTH.to(value_BTHV.dtype),
        initial_state=initial_state_DHKV, output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )  # fmt: skip
    return output, state


def _gradient_error(
    candidate: Rule, device: torch.device, dtype: torch.dtype, heads: DeltaHeads, packed: bool
) -> float:
    """Return the worst relative error of output and gradients on a small random problem."""
    generator = torch.Generator(device).manual_seed(0)
    rows, tokens = (1 if packed else 4), 192
    bounds = torch.tensor([0, 1, 70, tokens], dtype=torch.int32, device=device) if packed else None

    def random(*shape: int) -> Tensor:
        return torch.randn(rows, tokens, *shape, generator=generator, device=device)

    q, k = (
        torch.nn.functional.normalize(random(heads.key_heads, heads.key_dim), dim=-1).to(dtype)
        for _ in "qk"
    )
    v = random(heads.value_heads, heads.value_dim).to(dtype)
    g = -torch.nn.functional.softplus(random(heads.value_heads))
    inputs = [x.requires_grad_() for x in (q, k, v, g, random(heads.value_heads).sigmoid())]
    upstream = random(heads.value_heads, heads.value_dim).to(dtype)

    def results(rule: Rule) -> list[Tensor]:
        output, _ = rule(*inputs, cu_seqlens=bounds, output_final_state=False)
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    want = results(chunk_gated_delta_rule)
    got = results(candidate)
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(got, want)]
    return max(error.item() for error in errors)
