"""Zero-centered RMSNorm, with the parameter name and shape of TransformerEngine's: every norm of the torch backend, and
on both backends the one at a sublayer's head.

megatron-core's own CPU norm (`WrappedTorchNorm`) refuses zero-centered weights and sequence parallelism.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_q3n.kernels.residual_norm import residual_norm


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm(x) · (1 + weight), weight zero at init."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert config.layernorm_zero_centered_gamma
        assert config.normalization == "RMSNorm"
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=dtype or config.params_dtype, device=device))
        # every tensor-parallel rank sees other tokens (or heads): finalize_model_grads sums what carries this mark
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor, readers: int | None = None) -> Any:
        """Normalise the last dimension; the statistics are fp32 whatever x is.

        Returns: shaped like x. With `readers` a tuple: x as the stream that goes on, then a name for each reader.
        """
        stream, *normed = residual_norm(x, self.weight, self.eps, readers or 1)
        return normed[0] if readers is None else (stream, *normed)
