"""The loss of multi-token prediction, as a mean over the global batch's tokens.

At depth k the model predicts token t+1+k at position t; labels and mask move left with the tokens,
so each document loses k of its positions, and masks lose others. megatron-core's process_mtp_loss
divides by the count of each rank and micro-batch, which makes the loss depend on how a batch was
cut. Here losses are summed, and weighed by N / M_k: finalize_model_grads divides by N, the global
batch's language-model tokens, and what is left is 1 / M_k, the depth's own tokens.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 2.2.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from megatron.core.models.hybrid import hybrid_model
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from torch import Tensor


class MTPLosses:
    """What the depths' losses need to know and what they report, for one step of one model.

    `ratios` [depths] are N / M_k of the global batch, or None to take each micro-batch's own; `totals`
    [depths, 2] gathers (summed loss, tokens) of this rank. Both stay where they are in memory: a
    step captured as a CUDA graph reads and writes them there.
    """

    def __init__(self, depths: int) -> None:
        device = torch.cuda.current_device()
        self.ratios: Tensor | None = None
        self.totals = torch.zeros(depths, 2, dtype=torch.float64, device=device)

    def set_ratios(self, ratios: Tensor) -> None:
        """Give the next step its ratios."""
        if self.ratios is None:
            self.ratios = torch.empty(len(ratios), device=self.totals.device)
        self.ratios.copy_(ratios)

    def take_totals(self) -> Tensor:
        """Return the totals and start anew."""
        totals = self.totals.clone()
        self.totals.zero_()
        return totals


def count_predictions(loss_mask_BT: Tensor, cu_seqlens: Tensor | None, depths: int) -> Tensor:
    """Count the unmasked predictions of the next token and of every depth.

    Returns: float64 [1 + depths].
    """
    mask = loss_mask_BT.double()
    bounds = [0, mask.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ends = list(pairwise(bounds))
    counts = [
        torch.stack([mask[:, start + depth : end].sum() for start, end in ends]).sum()
        for depth in range(1 + depths)
    ]
    return torch.stack(counts)


def process_mtp_loss(
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_layer: Callable[..., tuple[Tensor, Any]],
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    config: TransformerConfig,
    cp_group: Any = None,
    packed_seq_params: Any = None,
    **_: object,
) -> Tensor:
    """Attach the depths' losses to the trunk's hidden states; megatron-core's function of this name.

    Shapes: hidden [(1 + depths) · S, B, H]: the trunk's, then each depth's; labels, mask [B, S].
    Returns: the trunk's [S, B, H].
    """
    trunk, *by_depth = torch.chunk(hidden_states, 1 + config.mtp_num_layers, dim=0)
    if labels is None or not is_training:
        return trunk
    ledger: MTPLosses = config.mtp_losses  # type: ignore[attr-defined]
    mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
    own_tokens = mask.sum()
    if config.mtp_detach_heads:
        output_weight = (output_layer.weight if output_weight is None else output_weight).detach()  # type: ignore[attr-defined]
    for depth, hidden in enumerate(by_depth):
        logits, _ = output_layer(
            hidden, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        labels, _ = roll_tensor(labels, -1, -1, cp_group, packed_seq_params)
        mask, _ = roll_tensor(mask, -1, -1, cp_group, packed_seq_params)
        losses = compute_language_model_loss(labels, logits) * mask
        with torch.no_grad():
            ledger.totals[depth] += torch.stack([losses.sum(), mask.sum()]).double()
        ratio = own_tokens / mask.sum().clamp(min=1)
        if ledger.ratios is not None:
            ratio = ledger.ratios[depth]
        weight = config.mtp_loss_scaling_factor / config.mtp_num_layers
        trunk = MTPLossAutoScaler.apply(trunk, losses * (weight * ratio))
    return trunk


hybrid_model.process_mtp_loss = (
    process_mtp_loss  # HybridModel.forward looks it up in its own module
)
