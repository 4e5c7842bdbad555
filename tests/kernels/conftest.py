"""Device of the fused kernels: a GPU when there is one, else Triton's interpreter on CPU tensors."""

import pytest
import torch


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Return the device on which fused kernels run here."""
    pytest.importorskip("triton", reason="Triton ships with torch for Linux only")
    if torch.cuda.is_available():
        return "cuda"
    _let_numpy_2_5_index()
    return "cpu"


def _let_numpy_2_5_index() -> None:
    """Patch Triton 3.6's interpreter: int() of one-element arrays, its loop bounds, is rejected by NumPy 2.5."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched
