"""Which of our fused kernels this process uses: decided once by `kernels/startup/qualification.py`, asked at every call.

Until something is qualified the answer is no, so the plain torch references run: on a CPU, in tests, and on a GPU
whose compiler gets a kernel wrong.
"""

from torch import Tensor

_qualified: set[str] = set()


def is_fused(operation: str, tensor: Tensor, forced: bool | None = None) -> bool:
    """Whether the fused kernel of `operation` runs on a tensor like this one; `forced` has the last word."""
    if forced is not None:
        return forced
    return operation in _qualified and tensor.is_cuda


def allow(operation: str) -> None:
    """Let the fused kernel of `operation` run from now on."""
    _qualified.add(operation)


def lacking(operations: tuple[str, ...]) -> list[str]:
    """Return those of the operations whose fused kernel is not in use."""
    return [operation for operation in operations if operation not in _qualified]


def forget() -> None:
    """Go back to the references."""
    _qualified.clear()
