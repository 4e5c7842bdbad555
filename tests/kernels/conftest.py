"""Where the fused kernels run: on a GPU when there is one, else in Triton's interpreter, on CPU tensors."""

import pytest
import torch


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Name the device fused kernels run on here."""
    pytest.importorskip("triton", reason="Triton ships with torch for Linux only")
    if torch.cuda.is_available():
        return "cuda"
    _let_numpy_2_5_index()
    return "cpu"


def _let_numpy_2_5_index() -> None:
    """Triton 3.6's interpreter turns one-element arrays into loop bounds with int(), which NumPy 2.5 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched
