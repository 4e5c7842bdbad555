"""The loss of multi-token prediction, as a mean over the global batch's tokens.

At depth k the model predicts token t+1+k at position t; labels and mask move left with the tokens,
so each document loses k of its positions, and masks lose others. megatron-core's process_mtp_loss
divides by the count of each rank and micro-batch, which makes the loss depend on how a batch was
cut. Here losses are summed, and weighed by N / M_k: finalize_model_grads divides by N, the global
batch's language-model tokens, and what is left is 1 / M_k, the depth's own tokens.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 2.2.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.core.models.hybrid import hybrid_model
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from torch import Tensor, nn

from megatron_q3n.config.mtp import MtpConfig
from megatron_q3n.model.mtp.draft_chain import DraftChain, DraftingMTP
from megatron_q3n.model.mtp.draft_losses import DraftPass


class MTPLosses:
    """What the depths' losses need to know and what they report, for one step of one model.

    `ratios` [depths] are N / M_k of the global batch, or None to take each micro-batch's own; `totals`
    [depths, 2] gathers (summed loss, tokens) of this rank; `own_drafts` [1] is the share of anchors
    that are fed their own drafts, `step` [1] the step. All stay where they are in memory: a step
    captured as a CUDA graph reads and writes them there. `kept` [acceptance depth, 3] gathers
    (drafts judged, kept greedily, Σ min(p, q)) of validation.
    """

    def __init__(self, depths: int, settings: MtpConfig | None = None, total_steps: int = 1) -> None:
        device = torch.cuda.current_device()
        self.settings, self._total_steps = settings or MtpConfig(), total_steps
        weights = self.settings.depth_weights or [1.0] * depths
        self._weights = [weight / sum(weights) for weight in weights]
        self.scaling_factor = 1.0
        self.ratios: Tensor | None = None
        self.totals = torch.zeros(depths, 2, dtype=torch.float64, device=device)
        self.own_drafts = torch.full((1,), self.settings.own_drafts_start, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.kept = torch.zeros(self.settings.acceptance_depth, 3, dtype=torch.float64, device=device)
        # left by the block for the loss of the same pass
        self.chain: DraftChain | None = None

    @property
    def measures(self) -> bool:
        """Whether validation drafts."""
        return self.settings.acceptance_depth > 0

    @property
    def never_drafts(self) -> bool:
        """Whether training feeds the text alone, at every step."""
        return self.settings.own_drafts_start == self.settings.own_drafts_end == 0

    def set_ratios(self, ratios: Tensor) -> None:
        """Give the next step its ratios."""
        if self.ratios is None:
            self.ratios = torch.empty(len(ratios), device=self.totals.device)
        self.ratios.copy_(ratios)

    def set_step(self, step: int) -> None:
        """Move to a step: the share of own drafts goes evenly from its start to its end."""
        done = step / max(1, self._total_steps - 1)
        start, end = self.settings.own_drafts_start, self.settings.own_drafts_end
        self.own_drafts.fill_(start + (end - start) * min(1.0, done))
        self.step.fill_(step)

    def scale(self, depth: int, own_tokens: Tensor, mask: Tensor) -> Tensor:
        """Return what a depth's summed loss counts for beside the language model's."""
        ratio = own_tokens / mask.sum().clamp(min=1)
        if self.ratios is not None:
            ratio = self.ratios[depth]
        return self._weights[depth] * self.scaling_factor * ratio

    @torch.no_grad()
    def add(self, depth: int, losses: Tensor, mask: Tensor) -> None:
        """Gather a micro-batch's losses."""
        self.totals[depth] += torch.stack([losses.sum(), mask.sum()]).double()

    def note(self, depth: int, judged: Tensor, agrees: Tensor, shared: Tensor) -> None:
        """Gather a micro-batch's drafts."""
        counts = [judged.sum(), (judged * agrees).sum(), (judged * shared).sum()]
        self.kept[depth] += torch.stack(counts).double()

    def take_kept(self) -> Tensor:
        """Return the drafts that were noted, and start anew."""
        kept = self.kept.clone()
        self.kept.zero_()
        return kept

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
        torch.stack([mask[:, start + depth : end].sum() for start, end in ends]).sum() for depth in range(1 + depths)
    ]
    return torch.stack(counts)


def freeze_trunk(model: nn.Module) -> None:
    """Leave only the MTP layer to be trained: not the trunk, nor the embedding and head it shares with it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mtp."))
        # megatron-core clips heads that are detached apart from the rest, and reports the rest's norm: there is no rest
        if hasattr(parameter, "grad_norm_group"):
            del parameter.grad_norm_group
    model.decoder.forward = partial(_run_frozen, model.decoder, model.decoder.forward)


class _NoGradient(torch.autograd.Function):
    """What was computed from a source, to autograd: with a gradient of zero, which pipeline stages want to send."""

    @staticmethod
    def forward(_: Any, computed: Tensor, source: Tensor) -> Tensor:
        """Return what was computed."""
        return computed.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """Return zeros."""
        return None, torch.zeros_like(gradients[0])


def _run_frozen(decoder: Any, forward: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    """Run a stage's part of a frozen trunk, keeping nothing for a backward pass."""
    with torch.no_grad():
        hidden = forward(*inputs, **options)
    received = None if decoder.pre_process else decoder.input_tensor
    if received is None or not torch.is_grad_enabled():
        return hidden
    return _NoGradient.apply(hidden, received)


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
    tp_group: Any = None,
    packed_seq_params: Any = None,
    **_: object,
) -> Tensor:
    """Attach the depths' losses to the trunk's hidden states; megatron-core's function of this name.

    Shapes: hidden [(1 + depths) · S, B, H]: the trunk's, then each depth's, or the trunk's alone where the
        block left a chain of drafts to run (draft_chain.py); labels, mask [B, S].
    Returns: the trunk's [S, B, H].
    """
    ledger: MTPLosses = config.mtp_losses  # type: ignore[attr-defined]
    ledger.scaling_factor = config.mtp_loss_scaling_factor
    chain, ledger.chain = ledger.chain, None
    trunk, *by_depth = torch.chunk(hidden_states, 1 if chain else 1 + config.mtp_num_layers, dim=0)
    if labels is None or not (is_training or chain):
        return trunk
    mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
    own_tokens = mask.sum()
    learnt_weight = output_weight
    if config.mtp_detach_heads:
        learnt_weight = (output_layer.weight if output_weight is None else output_weight).detach()  # type: ignore[attr-defined]

    def head(hidden: Tensor, learns: bool = True) -> Tensor:
        weight = learnt_weight if learns else output_weight
        return output_layer(hidden, weight=weight, runtime_gather_output=runtime_gather_output)[0]

    if chain:
        drafts = DraftPass(chain, head, config, (cp_group, tp_group), packed_seq_params)
        if is_training:
            return drafts.attach_losses(trunk, labels, mask, compute_language_model_loss)
        if ledger.measures:
            drafts.measure(trunk, mask)
        return trunk
    for depth, hidden in enumerate(by_depth):
        logits = head(hidden)
        labels, _ = roll_tensor(labels, -1, -1, cp_group, packed_seq_params)
        mask, _ = roll_tensor(mask, -1, -1, cp_group, packed_seq_params)
        losses = compute_language_model_loss(labels, logits) * mask
        ledger.add(depth, losses, mask)
        trunk = MTPLossAutoScaler.apply(trunk, losses * ledger.scale(depth, own_tokens, mask))
    return trunk


# HybridModel looks both up in its own module
hybrid_model.process_mtp_loss = process_mtp_loss
hybrid_model.MultiTokenPredictionBlock = DraftingMTP
