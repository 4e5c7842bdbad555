"""Registry of the fused kernels that are qualified in this process.

`kernels/startup/qualification.py` fills it once. Its only reader is `make_plan` (model/transformer_config.py), which
converts it into the ExecutionPlan; dispatchers receive the decision as their `fused` argument.
"""

from megatron_q3n.config.execution_plan import Kernel, KernelStatus

_qualified: set[Kernel] = set()
_unavailable: dict[Kernel, str] = {}


def allow(kernel: Kernel) -> None:
    """Record that a kernel has passed its check."""
    _qualified.add(kernel)
    _unavailable.pop(kernel, None)


def refuse(kernel: Kernel, reason: str) -> None:
    """Record why a kernel may not run."""
    _unavailable[kernel] = reason
    _qualified.discard(kernel)


def status() -> KernelStatus:
    """Return what is recorded so far."""
    return KernelStatus(frozenset(_qualified), dict(_unavailable))


def clear() -> None:
    """Remove all records, so that every operation runs its reference."""
    _qualified.clear()
    _unavailable.clear()
