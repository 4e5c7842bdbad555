"""The model's passes on this rank, in step with the ranks it works with.

Tensor-parallel ranks do the same work, and the first one's draws hold for all, since rounding may
differ. Expert-parallel ranks may each have sequences of their own: every pass is an exchange between
them, so all make the same number of passes per step, idle ones over a single dummy token, until
nobody has work.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_q3n.model.decode.forward import extend, extend_mtp, logits_of
from megatron_q3n.model.decode.fused_linear import read_out
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.decode.state import DecodeState


class Passes:
    """Runs the trunk and the draft layer, and agrees with other ranks."""

    def __init__(self, model: Any, draft_depth: int) -> None:
        self.model, self.draft_depth = model, draft_depth
        self.device = next(model.parameters()).device
        self._tp_group, self._exchange_group = model.pg_collection.tp, model.pg_collection.tp_ep
        self._num_trunk = self._num_draft = 0

    def empty_state(self, num_sequences: int) -> DecodeState:
        """Return the state of sequences without tokens."""
        return DecodeState.empty(self.model, num_sequences)

    def span(self, starts: list[int], counts: list[int]) -> Span:
        """Return a span on this device."""
        return Span(starts, counts, self.device)

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part in a pass."""
        return self._exchange_group.size() == self._tp_group.size() == 1

    def trunk(self, tokens_S: Tensor, span: Span, state: DecodeState, **options: bool) -> Tensor:
        """Run the trunk; see `decode.extend`, also for the options. Once per step."""
        self._num_trunk += 1
        return extend(self.model, tokens_S, span, state, **options)

    def draft_layer(
        self, hidden_SX: Tensor, next_tokens_S: Tensor, span: Span, state: DecodeState, **options: bool
    ) -> Tensor:
        """Run the MTP layer; see `decode.extend_mtp`, also for the options. At most `draft_depth` times per step."""
        self._num_draft += 1
        return extend_mtp(self.model, hidden_SX, next_tokens_S, span, state, **options)

    def read_out(self, hidden_SX: Tensor, *, drafts: bool = False) -> tuple[Tensor, Tensor]:
        """Finish what came un-normed from the trunk, or from the draft layer.

        Returns: hidden [S,X] after the last norm, and logits [S,V] in their own format.
        """
        layers = self.model.mtp.layers[0] if drafts else self.model.decoder
        norm = layers.final_layernorm if drafts else layers.final_norm
        return read_out(self.model, norm, hidden_SX)

    def logits(self, hidden_SX: Tensor) -> Tensor:
        """Return fp32 logits [S,V]."""
        return logits_of(self.model, hidden_SX)

    def finish_step(self) -> None:
        """Keep the other ranks company in the passes that this rank had no use for in this step."""
        if self._exchange_group.size() > 1:
            token, span = self.tokens([0]), self.span([0], [1])
            if not self._num_trunk:
                self.trunk(token, span, self.empty_state(1))
            while self._num_draft < self.draft_depth:
                hidden = torch.zeros_like(self.model.decoder.final_norm.weight)[None]
                self.draft_layer(hidden, token, span, self.empty_state(1))
        self._num_trunk = self._num_draft = 0

    def anyone(self, has_work: bool) -> bool:
        """Say whether any rank that shares experts with this one has work. A collective call."""
        if self._exchange_group.size() == 1:
            return has_work
        votes = torch.tensor([float(has_work)], device=self.device)
        torch.distributed.all_reduce(votes, group=self._exchange_group)
        return votes.item() > 0

    def take_first_ranks(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with the one of the first tensor-parallel rank, and return it."""
        if self._tp_group.size() > 1:
            torch.distributed.broadcast(tensor, group=self._tp_group, group_src=0)
        return tensor

    def tokens(self, ids: list[int]) -> Tensor:
        """Return ids on this device."""
        return torch.tensor(ids, dtype=torch.long).to(self.device, non_blocking=True)

    def numbers(self, rows: list[list[float]]) -> Tensor:
        """Return random numbers on this device, fp64."""
        return torch.tensor(rows, dtype=torch.float64).to(self.device, non_blocking=True)
