"""Start-up checks of the fused kernels, run whole on a CPU: in Triton's interpreter each kernel passes its own check.

A check that is itself wrong would disable its kernel on every GPU. Not interpreted: decode attention, whose bf16
products the interpreter computes on raw bits, and the grouped GEMM and FP8 kernels, which need a GPU's instructions.
Their checks run up to the kernel, which catches wrong arguments.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.config import RunConfig, validate
from megatron_q3n.config.execution_plan import Kernel

CHECKS = ("check_inputs", "decode_checks", "gated_delta_checks", "layer_checks", "moe_checks")
NEEDS_GPU = (Kernel.DECODE_ATTENTION, Kernel.GROUPED_GEMM, Kernel.FP8_EXPERTS)
# the delta rule: test_delta_rule_check.py
INTERPRETED = sorted(set(Kernel) - {*NEEDS_GPU, Kernel.GATED_DELTA_RULE})


# the exchange of expert-parallel ranks has a check where there are several
EP2 = {"parallel": {"world_size": 2, "expert_model_parallel_size": 2}, "training": {"global_batch_size": 8}}


def tiny(fp8: str | None = None) -> RunConfig:
    model = {
        "hidden_size": 32,
        "vocab_size": 512,
        "kv_channels": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
    }
    return validate({"model": model, "precision": {"compute": "bf16", "fp8": fp8}, **EP2})


@pytest.fixture
def checks(alone: Any, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> dict[Kernel, Any]:
    """The checks of a tiny model, with their inputs on this machine's device (`alone`: "cuda" means the CPU)."""
    import importlib

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        generator = torch.Generator(triton_device).manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, device=triton_device).to(dtype)

    for name in CHECKS:
        module = importlib.import_module(f"megatron_q3n.kernels.startup.{name}")
        if hasattr(module, "random"):
            monkeypatch.setattr(module, "random", random)
        if hasattr(module, "NUM_TOKENS"):
            monkeypatch.setattr(module, "NUM_TOKENS", 72)
    qualification = importlib.import_module("megatron_q3n.kernels.startup.qualification")
    return qualification._checks(tiny("hybrid"))


@pytest.mark.parametrize("kernel", INTERPRETED)
def test_a_kernel_passes_its_check(kernel: Kernel, checks: dict[Kernel, Any]) -> None:
    actual, expected = checks[kernel]()
    assert len(actual) == len(expected) > 0
    for ours, reference in zip(actual, expected):
        assert (ours.float() - reference.float()).norm() <= 2e-2 * reference.float().norm()


def failure_of(check: Any) -> Exception | None:
    """Return what a check raises."""
    try:
        check()
    except Exception as problem:
        return problem
    return None


@pytest.mark.parametrize("kernel", NEEDS_GPU)
def test_a_check_reaches_its_kernel(kernel: Kernel, checks: dict[Kernel, Any]) -> None:
    """Without a GPU Triton or torch fails inside the kernel, but not a call of ours."""
    failure = failure_of(checks[kernel])
    assert not isinstance(failure, TypeError) or "argument" not in str(failure), failure
