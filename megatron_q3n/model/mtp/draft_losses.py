"""Losses and acceptance statistics of draft chains: scheduled sampling, teacher forcing, distillation.

**Inputs.** Depth 1 is fed the text's next token, which in decoding is the token just sampled. Depth k is fed the text's
token k positions ahead (teacher forcing), or the argmax of depth k-1, as in greedy decoding (scheduled sampling,
Bengio et al., arXiv 1506.03099). A pseudo-random number decides for each anchor; the probability of its own drafts
(`MTPLosses.own_draft_probability`) follows a schedule.

**Targets.** At depth k the text's token k+1 positions ahead, and/or the model's own distribution there (distillation),
which is known as long as the tokens between are the text's. After a draft that differs from the text the text is no
longer what follows: with `after_wrong_draft=teacher_forcing` it stays the label all the same; with `mask` the anchor is
excluded at deeper depths, because verification discards what follows a rejected draft. Distillation always excludes it.

**Acceptance.** In validation every anchor feeds its own drafts, as in decoding, and they are verified against the
model's own next-token distribution p, not against the text. p is known where the preceding drafts equal the text's
tokens; so acceptance at depth k is measured there, among anchors whose preceding drafts were all accepted.
evaluation/draft_acceptance.py measures it without that condition, at the cost of a trunk pass each.

Shapes: as in draft_chain.py; V this rank's part of the vocabulary.
"""

from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_q3n.model.context_parallel import shift_left
from megatron_q3n.model.mtp.draft_chain import DraftChain
from megatron_q3n.model.mtp.vocab_parallel import Divergence, argmax_tokens, hashed_uniform, overlap, probabilities


class DraftPass:
    """Draft chain of one micro-batch with the output layer, its losses and its acceptance statistics."""

    def __init__(
        self,
        chain: DraftChain,
        head: Callable[[Tensor, bool], Tensor],
        config: TransformerConfig,
        groups: tuple[ProcessGroup, ProcessGroup],
        packed_seq_params: PackedSeqParams | None,
    ) -> None:
        self.chain, self.head, self.config = chain, head, config
        self.cp_group, self.tp_group = groups
        self.packed_seq_params, self.mtp_losses = packed_seq_params, config.pass_state.mtp

    def attach_losses(
        self, trunk_SBX: Tensor, labels_BS: Tensor, mask_BS: Tensor, cross_entropy: Callable[..., Tensor]
    ) -> Tensor:
        """Attach every depth's loss to the trunk's hidden states. Returns: these [S,B,X]."""
        settings, num_tokens = self.mtp_losses.settings, mask_BS.sum()
        target_SBV = self._target(trunk_SBX) if settings.distillation_weight else None
        hidden = trunk_SBX
        if self.config.mtp_detach_heads:
            hidden = trunk_SBX.detach().requires_grad_()
        correct_BS, draft_BS = torch.ones_like(mask_BS), None
        text_BS = self.chain.tokens_BS
        uniform_BS = hashed_uniform(text_BS, self.chain.positions_BS, self.mtp_losses.step)
        for depth in range(self.config.mtp_num_layers):
            text_BS, labels_BS, mask_BS = (self._shift(x) for x in (text_BS, labels_BS, mask_BS))
            target_SBV = None if target_SBV is None else self._shift_target(target_SBV)
            input_BS = text_BS
            if draft_BS is not None:
                input_BS = torch.where(uniform_BS < self.mtp_losses.own_draft_probability, draft_BS, text_BS)
            correct_BS = correct_BS * (input_BS == text_BS)
            hidden = self.chain.advance(hidden, input_BS)
            logits = self.head(hidden, True)
            # before the cross-entropy, which overwrites the logits
            if not self.mtp_losses.is_teacher_forcing_only:
                draft_BS = argmax_tokens(logits, self.tp_group).transpose(0, 1)
            losses = self._losses(logits, target_SBV, labels_BS, mask_BS, correct_BS, cross_entropy)
            scale = self.mtp_losses.scale(depth, num_tokens, mask_BS)
            trunk_SBX = MTPLossAutoScaler.apply(trunk_SBX, losses * scale)
            self.mtp_losses.add(depth, losses, mask_BS)
        return trunk_SBX

    def _losses(
        self,
        logits: Tensor,
        target: Tensor | None,
        labels: Tensor,
        mask: Tensor,
        correct: Tensor,
        cross_entropy: Callable[..., Tensor],
    ) -> Tensor:
        """Return each anchor's loss at one depth, [B,S]."""
        settings, total = self.mtp_losses.settings, torch.zeros_like(mask)
        if target is not None:
            divergence = Divergence.apply(logits, target, self.tp_group).transpose(0, 1)
            total = total + settings.distillation_weight * divergence * mask * correct
        # last, because it may overwrite the logits
        if settings.label_weight:
            label_mask = mask * correct if settings.after_wrong_draft == "mask" else mask
            total = total + settings.label_weight * cross_entropy(labels, logits) * label_mask
        return total

    @torch.no_grad()
    def measure_acceptance(self, trunk_SBX: Tensor, mask_BS: Tensor) -> None:
        """Draft greedily from every anchor, and count the drafts that the model itself would accept."""
        text_BS, hidden, logits = self.chain.tokens_BS, trunk_SBX, None
        target_SBV, accepted_BS = self._target(trunk_SBX), torch.ones_like(mask_BS)
        for depth in range(self.mtp_losses.settings.acceptance_depth):
            text_BS, mask_BS = self._shift(text_BS), self._shift(mask_BS)
            target_SBV = self._shift_target(target_SBV)
            if logits is not None:
                draft_BS = argmax_tokens(logits, self.tp_group).transpose(0, 1)
                accepted_BS = accepted_BS * (draft_BS == text_BS)
            # anchors whose draft is not the text's token are excluded, so feeding the text is exact
            hidden = self.chain.advance(hidden, text_BS)
            logits = self.head(hidden, False)
            p, q = (probabilities(x, self.tp_group)[0] for x in (target_SBV, logits))
            verified_BS = accepted_BS * mask_BS
            agrees_SB = argmax_tokens(logits, self.tp_group) == argmax_tokens(target_SBV, self.tp_group)
            overlap_BS = overlap(p, q, self.tp_group).transpose(0, 1)
            agrees_BS = agrees_SB.transpose(0, 1).float()
            self.mtp_losses.add_acceptance(depth, verified_BS, agrees_BS, overlap_BS)
            accepted_BS = accepted_BS * agrees_BS

    @torch.no_grad()
    def _target(self, trunk_SBX: Tensor) -> Tensor:
        """Return the model's own logits at every position."""
        return self.head(trunk_SBX.detach(), False)

    def _shift(self, tensor_BS: Tensor) -> Tensor:
        """Shift left by one position within each document, with zero at its end."""
        return shift_left(tensor_BS, -1, self.packed_seq_params, self.cp_group)

    def _shift_target(self, logits_SBV: Tensor) -> Tensor:
        # without context parallelism a plain roll suffices: what crosses a document's end is masked
        if self.cp_group.size() == 1:
            return logits_SBV.roll(-1, 0)
        return shift_left(logits_SBV.permute(1, 2, 0), -1, self.packed_seq_params, self.cp_group).permute(2, 0, 1)
