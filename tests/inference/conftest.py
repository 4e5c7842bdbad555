"""Where fused kernels run here is decided as for the kernels' own tests."""

from tests.kernels.conftest import triton_device

__all__ = ["triton_device"]
