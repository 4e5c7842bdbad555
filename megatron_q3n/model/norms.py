"""Zero-centered RMSNorm with the parameter name and shape of TransformerEngine's.

It is every norm of the torch backend and, on both backends, the norm at the start of a sublayer.
megatron-core's own CPU norm (`WrappedTorchNorm`) refuses zero-centered weights and sequence parallelism.
"""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_q3n.kernels.residual_norm import residual_norm


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm(x) · (1 + weight), weight zero at initialization."""

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
        self.config, self.eps = config, eps
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=dtype or config.params_dtype, device=device))
        # Tensor-parallel ranks normalize different tokens (or heads): finalize_model_grads sums the gradients of
        # parameters with this attribute.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor, num_consumers: int | None = None) -> Tensor | tuple[Tensor, ...]:
        """Normalize the last dimension, with statistics in fp32.

        With `num_consumers`, return one alias of the normed tokens per consumer, so that their gradients and that of
        the residual accumulate in the fused RMSNorm backward.

        Returns: a tensor shaped like x; with `num_consumers` the tuple (x as the residual, alias, alias, …).
        """
        residual, *normed = residual_norm(
            x, self.weight, self.eps, num_consumers or 1, fused=bool(self.config.plan.norm)
        )
        return normed[0] if num_consumers is None else (residual, *normed)
