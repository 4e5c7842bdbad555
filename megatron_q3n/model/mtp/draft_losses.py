"""What the drafts of a chain are fed and taught, and how many of them the model itself would keep.

**Fed.** At depth 1 the text's next token, which in decoding is the one just drawn. At depth k the
text's token k places on, or the likeliest token of depth k-1, which is what greedy decoding feeds:
each anchor tosses a coin, whose odds (`MTPLosses.own_drafts`) the training moves.

**Taught.** At depth k the text's token k+1 places on, and/or the model's own distribution there, which
is known as long as the tokens between are the text's. After a draft that differs from the text the
target is no longer what would follow: "text" asks for it all the same, "skip" leaves the anchor out,
as a rejected draft's successors never matter. Distillation then always leaves it out.

**Kept.** In validation every anchor feeds its own drafts, as decoding does, and they are held against
the model's own next-token distribution p, not against the text. p is known where the drafts before
are the text's tokens: acceptance at depth k is measured there, among anchors whose drafts before were
all kept. evaluation/draft_acceptance.py does it without that condition, and at a pass of the trunk each.

Shapes: as in draft_chain.py; V this rank's part of the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from torch import Tensor

from megatron_q3n.model.mtp.draft_chain import DraftChain
from megatron_q3n.model.mtp.vocab_parallel import Divergence, coin, likeliest_tokens, overlap, probabilities


class DraftPass:
    """One micro-batch: its chain, the head, and the layout it is cut by."""

    def __init__(
        self,
        chain: DraftChain,
        head: Callable[[Tensor, bool], Tensor],
        config: Any,
        groups: tuple[Any, Any],
        packing: Any,
    ) -> None:
        self.chain, self.head, self.config = chain, head, config
        self.cp_group, self.tp_group = groups
        self.packing, self.ledger = packing, config.mtp_losses

    def attach_losses(
        self, trunk_SBX: Tensor, labels_BS: Tensor, mask_BS: Tensor, cross_entropy: Callable[..., Tensor]
    ) -> Tensor:
        """Attach every depth's loss to the trunk's states. Returns: these."""
        settings, own_tokens = self.ledger.settings, mask_BS.sum()
        target_SBV = self._target(trunk_SBX) if settings.distillation_weight else None
        hidden = trunk_SBX
        if self.config.mtp_detach_heads:
            hidden = trunk_SBX.detach().requires_grad_()
        right_BS, own_BS = torch.ones_like(mask_BS), None
        text_BS = self.chain.tokens_BS
        toss_BS = coin(text_BS, self.chain.positions_BS, self.ledger.step)
        for depth in range(self.config.mtp_num_layers):
            text_BS, labels_BS, mask_BS = (self._shift(x) for x in (text_BS, labels_BS, mask_BS))
            target_SBV = None if target_SBV is None else self._shift_target(target_SBV)
            fed_BS = text_BS
            if own_BS is not None:
                fed_BS = torch.where(toss_BS < self.ledger.own_drafts, own_BS, text_BS)
            right_BS = right_BS * (fed_BS == text_BS)
            hidden = self.chain.advance(hidden, fed_BS)
            logits = self.head(hidden, True)
            if not self.ledger.never_drafts:  # before the cross-entropy, which overwrites logits
                own_BS = likeliest_tokens(logits, self.tp_group).transpose(0, 1)
            losses = self._losses(logits, target_SBV, labels_BS, mask_BS, right_BS, cross_entropy)
            trunk_SBX = MTPLossAutoScaler.apply(trunk_SBX, losses * self.ledger.scale(depth, own_tokens, mask_BS))
            self.ledger.add(depth, losses, mask_BS)
        return trunk_SBX

    def _losses(
        self,
        logits: Tensor,
        target: Tensor | None,
        labels: Tensor,
        mask: Tensor,
        right: Tensor,
        cross_entropy: Callable[..., Tensor],
    ) -> Tensor:
        """Return each anchor's loss at one depth, [B,S]."""
        settings, total = self.ledger.settings, torch.zeros_like(mask)
        if target is not None:
            divergence = Divergence.apply(logits, target, self.tp_group).transpose(0, 1)
            total = total + settings.distillation_weight * divergence * mask * right
        if settings.label_weight:  # last: it may work on the logits in place
            asked = mask * right if settings.after_wrong_draft == "skip" else mask
            total = total + settings.label_weight * cross_entropy(labels, logits) * asked
        return total

    @torch.no_grad()
    def measure(self, trunk_SBX: Tensor, mask_BS: Tensor) -> None:
        """Draft greedily from every anchor, and note what the model itself would keep."""
        text_BS, hidden, logits = self.chain.tokens_BS, trunk_SBX, None
        target_SBV, kept_BS = self._target(trunk_SBX), torch.ones_like(mask_BS)
        for depth in range(self.ledger.settings.acceptance_depth):
            text_BS, mask_BS = self._shift(text_BS), self._shift(mask_BS)
            target_SBV = self._shift_target(target_SBV)
            if logits is not None:
                own_BS = likeliest_tokens(logits, self.tp_group).transpose(0, 1)
                kept_BS = kept_BS * (own_BS == text_BS)
            hidden = self.chain.advance(hidden, text_BS)  # where it is not the draft, nothing counts
            logits = self.head(hidden, False)
            p, q = (probabilities(x, self.tp_group)[0] for x in (target_SBV, logits))
            judged_BS = kept_BS * mask_BS
            agrees_SB = likeliest_tokens(logits, self.tp_group) == likeliest_tokens(target_SBV, self.tp_group)
            shared_BS = overlap(p, q, self.tp_group).transpose(0, 1)
            agrees_BS = agrees_SB.transpose(0, 1).float()
            self.ledger.note(depth, judged_BS, agrees_BS, shared_BS)
            kept_BS = kept_BS * agrees_BS

    @torch.no_grad()
    def _target(self, trunk_SBX: Tensor) -> Tensor:
        """Return the model's own logits at every position."""
        return self.head(trunk_SBX.detach(), False)

    def _shift(self, tensor_BS: Tensor) -> Tensor:
        """Return what stands one place further on, zero beyond the end."""
        return roll_tensor(tensor_BS, -1, -1, self.cp_group, self.packing)[0]

    def _shift_target(self, logits_SBV: Tensor) -> Tensor:
        if self.cp_group.size() == 1:  # what comes over an end is masked
            return logits_SBV.roll(-1, 0)
        rolled, _ = roll_tensor(logits_SBV.permute(1, 2, 0), -1, -1, self.cp_group, self.packing)
        return rolled.permute(2, 0, 1)
