"""Multi-token prediction loss, normalized as a mean over the global batch's tokens of each depth.

At depth k the model predicts token t+1+k at position t; labels and mask shift left with the tokens, so each document
loses k of its positions, and masks exclude others. megatron-core's process_mtp_loss divides by the token count of each
rank and micro-batch, so that its loss depends on how the batch is split. Here the losses of a depth are summed and
weighted by N / M_k, where N counts the global batch's language-model tokens and M_k those of the depth. Together with
the pre-scaling of every loss by 1/N (training/loss.py) that is a mean over M_k.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 2.2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_q3n.model.context_parallel import shift_left
from megatron_q3n.model.mtp.draft_losses import DraftPass
from megatron_q3n.packing import Packing


def count_predictions(loss_mask_BT: Tensor, packing: Packing | None, depths: int) -> Tensor:
    """Count the unmasked predictions of the next token and of every depth.

    Returns: float64 [1 + depths].
    """
    mask = loss_mask_BT.double()
    spans = ((0, mask.shape[1]),) if packing is None else packing.spans
    counts = [
        torch.stack([mask[:, start + depth : end].sum() for start, end in spans]).sum() for depth in range(1 + depths)
    ]
    return torch.stack(counts)


def freeze_trunk(model: nn.Module) -> None:
    """Freeze all parameters but the MTP layer's: the trunk, and the embedding and output layer that they share."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mtp."))
        # megatron-core clips detached heads separately and reports the other parameters' norm; here there are no others
        if hasattr(parameter, "grad_norm_group"):
            del parameter.grad_norm_group
    model.decoder.forward = partial(_run_frozen, model.decoder, model.decoder.forward)


class _ZeroGradient(torch.autograd.Function):
    """Identity whose source gets a gradient of zero, because pipeline stages send a gradient for their input."""

    @staticmethod
    def forward(_: Any, computed: Tensor, source: Tensor) -> Tensor:
        """Return a copy of the computed tensor."""
        return computed.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """Return zeros for the source."""
        return None, torch.zeros_like(gradients[0])


def _run_frozen(decoder: Any, forward: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    """Run a pipeline stage's part of a frozen trunk without saving activations."""
    with torch.no_grad():
        hidden = forward(*inputs, **options)
    received = None if decoder.pre_process else decoder.input_tensor
    if received is None or not torch.is_grad_enabled():
        return hidden
    return _ZeroGradient.apply(hidden, received)


def process_mtp_loss(
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_layer: Callable[..., tuple[Tensor, object]],
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    config: TransformerConfig,
    cp_group: ProcessGroup | None = None,
    tp_group: ProcessGroup | None = None,
    packed_seq_params: PackedSeqParams | None = None,
    **_: object,
) -> Tensor:
    """Attach the depths' losses to the trunk's hidden states; replaces megatron-core's function of this name.

    Shapes: hidden [(1 + depths)·S, B, H]: the trunk's, then each depth's; or the trunk's alone if the MTP block stored
        a draft chain (draft_chain.py); labels, mask [B, S].
    Returns: the trunk's hidden states [S, B, H].
    """
    mtp_losses = config.pass_state.mtp
    mtp_losses.scaling_factor = config.mtp_loss_scaling_factor
    chain = config.pass_state.take_draft_chain()
    trunk, *by_depth = torch.chunk(hidden_states, 1 if chain else 1 + config.mtp_num_layers, dim=0)
    if labels is None or not (is_training or chain):
        return trunk
    mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
    num_tokens = mask.sum()
    trained_weight = output_weight
    if config.mtp_detach_heads:
        trained_weight = (output_layer.weight if output_weight is None else output_weight).detach()  # type: ignore[attr-defined]

    def head(hidden: Tensor, is_trained: bool = True) -> Tensor:
        weight = trained_weight if is_trained else output_weight
        return output_layer(hidden, weight=weight, runtime_gather_output=runtime_gather_output)[0]

    assert cp_group is not None, "HybridModel passes its groups"
    if chain:
        assert tp_group is not None, "HybridModel passes its groups"
        drafts = DraftPass(chain, head, config, (cp_group, tp_group), packed_seq_params)
        if is_training:
            return drafts.attach_losses(trunk, labels, mask, compute_language_model_loss)
        if mtp_losses.measures_acceptance:
            drafts.measure_acceptance(trunk, mask)
        return trunk
    for depth, hidden in enumerate(by_depth):
        logits = head(hidden)
        labels, mask = (shift_left(x, -1, packed_seq_params, cp_group) for x in (labels, mask))
        losses = compute_language_model_loss(labels, logits) * mask
        mtp_losses.add(depth, losses, mask)
        trunk = MTPLossAutoScaler.apply(trunk, losses * mtp_losses.scale(depth, num_tokens, mask))
    return trunk
