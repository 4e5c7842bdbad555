"""Registry of qualified kernels: the last verdict counts, a snapshot does not change, and qualification starts anew."""

import torch

from megatron_q3n.config import validate
from megatron_q3n.config.execution_plan import Kernel
from megatron_q3n.kernels import registry


def test_the_last_verdict_counts() -> None:
    assert registry.status().qualified == frozenset()
    registry.allow(Kernel.SWIGLU)
    registry.refuse(Kernel.DECODE_GEMM, "FAILED its check")
    before = registry.status()
    assert before.obstacle(Kernel.SWIGLU) is None
    assert before.obstacle(Kernel.DECODE_GEMM) == "FAILED its check"
    assert before.obstacle(Kernel.PERMUTATION) == "the MoE token permutation kernel is not qualified in this process"
    registry.allow(Kernel.DECODE_GEMM)
    registry.refuse(Kernel.SWIGLU, "does not run here")
    after = registry.status()
    assert (after.qualified, after.obstacle(Kernel.SWIGLU)) == ({Kernel.DECODE_GEMM}, "does not run here")
    assert before.qualified == {Kernel.SWIGLU}, "a plan that is made keeps its kernels"
    registry.clear()
    assert registry.status().qualified == frozenset()
    assert not registry.status().unavailable


def test_qualification_without_a_gpu_withdraws_earlier_verdicts() -> None:
    """A model that is built next runs the references, and its plan says why."""
    from megatron_q3n.kernels.startup.qualification import qualify

    registry.allow(Kernel.SWIGLU)
    verdicts = qualify(validate({}), torch.device("cpu"), torch.float32)
    assert registry.status().qualified == frozenset()
    assert verdicts[Kernel.GATED_DELTA_RULE].startswith("torch: ")
    reason = registry.status().obstacle(Kernel.GATED_DELTA_RULE)
    assert reason == verdicts[Kernel.GATED_DELTA_RULE].removeprefix("torch: ")
