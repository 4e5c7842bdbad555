"""Fixtures shared with the tests of kernels: the device on which fused kernels run."""

from tests.kernels.conftest import triton_device

__all__ = ["triton_device"]
