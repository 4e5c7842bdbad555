"""Qualification of the fused kernels at start-up: each against its reference, with gradients, on this GPU and compiler.

A version number does not qualify a kernel: FLA's Triton backward is silently wrong on Hopper with Triton 3.4 to 3.7.0
(flash-linear-attention issue 640), and the next such bug is unknown. A kernel that is wrong, or does not run, is
replaced by its torch reference, with a warning and an entry in environment.json. The checks use few tokens with the
model's real heads and widths, so that the kernels compiled here are those that training runs.

The checks run in parallel threads: on a cold machine their time is nearly all compilation, which releases Python's
lock. The kernels of the delta rule, by far the slowest to compile, have a helper process that starts before torch is
imported (`compile_ahead.py`). Each verdict includes the duration of its check.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from megatron_q3n.config import RunConfig
from megatron_q3n.config.execution_plan import Kernel
from megatron_q3n.kernels import registry
from megatron_q3n.kernels.gated_delta.operands import DeltaHeads
from megatron_q3n.kernels.startup import compile_ahead, decode_checks, gated_delta_checks, layer_checks, moe_checks
from megatron_q3n.kernels.startup.check_inputs import Results
from megatron_q3n.kernels.startup.delta_rule_check import check_delta_rule
from megatron_q3n.kernels.startup.delta_rule_problems import checked_problems, num_head_shares, packs_documents

Check = Callable[[], tuple[Results, Results]]

# relative, for bf16 operands; the error of a wrong kernel is far larger
_TOLERANCE = 2e-2
# e4m3 has four significant bits
_FP8_TOLERANCE = 0.15
_KERNEL_ERRORS = (RuntimeError, ImportError, ValueError, AssertionError, NotImplementedError, TypeError)
_seconds: dict[str, float] = {}


def qualify(config: RunConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Check every fused kernel that this model can use, and enable those that are correct.

    Returns: per operation "backend: reason", for the log and environment.json.
    """
    registry.clear()
    _seconds.clear()
    if device.type != "cuda" or dtype != torch.bfloat16:
        reason = "without a GPU" if device.type != "cuda" else f"in {str(dtype).removeprefix('torch.')}"
        reference = check_delta_rule(device, dtype, ())
        return {Kernel.GATED_DELTA_RULE: reference, "other fused kernels": f"torch: there are none {reason}"}
    rule = partial(check_delta_rule, device, dtype, checked_problems(config))
    tasks: dict[Kernel, Callable[[], str]] = {Kernel.GATED_DELTA_RULE: rule}
    tasks |= {kernel: partial(_verdict, kernel, check) for kernel, check in _checks(config).items()}
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = {name: pool.submit(_run_timed, device, name, task) for name, task in tasks.items()}
        verdicts = {name: future.result() for name, future in futures.items()}
    verdicts |= _agree()
    # the delta rule's reference took some GiB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ahead = compile_ahead.finish()
    return verdicts | ({} if ahead is None else {"compiled ahead": ahead})


def _agree() -> dict[Kernel, str]:
    """Refuse on every rank the kernels that any rank refused: paths with collectives must be the same everywhere.

    A collective call where there are several processes. Returns: the verdicts that change.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return {}
    refused: list[dict[Kernel, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(refused, dict(registry.status().unavailable))
    own = refused[torch.distributed.get_rank()]
    return {
        kernel: _refuse(kernel, f"refused on rank {rank}: {reason}")
        for rank, found in enumerate(refused)
        for kernel, reason in found.items()
        if kernel not in own
    }


def seconds() -> dict[str, float]:
    """Return the duration of each check of the last `qualify`; they run in parallel."""
    return dict(_seconds)


def _checks(config: RunConfig) -> dict[Kernel, Check]:
    """Return the check of each operation."""
    heads, conv_kernel_size = _local_heads(config), config.model.linear_conv_kernel_dim
    packed = packs_documents(config)
    checks: dict[Kernel, Check] = {
        Kernel.GATED_DELTA_MIXER: partial(gated_delta_checks.check_mixer, heads, conv_kernel_size, packed),
        Kernel.DECODE_GATED_DELTA: partial(gated_delta_checks.check_decode_step, heads, conv_kernel_size),
        Kernel.QKV_NORM_ROPE: partial(layer_checks.check_qkv_norm_rope, config),
        Kernel.RESIDUAL_NORM: partial(layer_checks.check_residual_norm, config),
        Kernel.PERMUTATION: partial(moe_checks.check_permutation, config),
        Kernel.SWIGLU: partial(moe_checks.check_swiglu, config),
        Kernel.SHARED_EXPERT_GATE: partial(moe_checks.check_shared_expert_gate, config),
        Kernel.GROUPED_GEMM: partial(moe_checks.check_grouped_gemm, config),
        Kernel.DECODE_EXPERTS: partial(decode_checks.check_decode_experts, config),
        Kernel.DECODE_ATTENTION: partial(decode_checks.check_decode_attention, config),
        Kernel.DECODE_ROUTER: partial(decode_checks.check_decode_router, config),
        Kernel.DECODE_GEMM: partial(decode_checks.check_decode_gemm, config),
        Kernel.DECODE_ARGMAX: partial(decode_checks.check_decode_argmax, config),
    }
    if config.parallel.expert_model_parallel_size > 1:
        checks[Kernel.EXPERT_EXCHANGE] = partial(moe_checks.check_expert_exchange, config)
    if config.precision.fp8:
        checks[Kernel.FP8_EXPERTS] = partial(moe_checks.check_fp8_experts, config)
    return checks


def _local_heads(config: RunConfig) -> DeltaHeads:
    return DeltaHeads.of(config.model, num_head_shares(config))


def _run_timed(device: torch.device, name: str, task: Callable[[], str]) -> str:
    torch.cuda.set_device(device)
    started = time.perf_counter()
    verdict = task()
    _seconds[name] = time.perf_counter() - started
    return f"{verdict} in {_seconds[name]:.1f} s"


def _verdict(kernel: Kernel, check: Check) -> str:
    """Enable a kernel if its results and gradients match those of the reference, and return the verdict."""
    tolerance = _FP8_TOLERANCE if kernel is Kernel.FP8_EXPERTS else _TOLERANCE
    try:
        actual, expected = check()
        errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(actual, expected, strict=True)]
        # of tensors, whose maximum is NaN if any error is
        error = torch.stack(errors).max().item()
    except _KERNEL_ERRORS as exception:
        what = f"{type(exception).__name__}: {exception}"
        return _refuse(kernel, f"the fused kernel does not run here ({what}); expect slower steps")
    if not error < tolerance:
        return _refuse(kernel, f"the fused kernel FAILED its check on this GPU (relative error {error:.1e})")
    registry.allow(kernel)
    return f"fused: output and gradients checked on this GPU (relative error {error:.1e})"


def _refuse(kernel: Kernel, reason: str) -> str:
    registry.refuse(kernel, reason)
    return f"torch: {reason}"
