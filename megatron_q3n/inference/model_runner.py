"""Model runner: trunk and MTP passes of this rank, synchronized with the ranks it shares a model with.

Tensor-parallel ranks do the same work; sampled tokens are broadcast from the first rank, because rounding may differ.
Expert-parallel ranks may have different sequences. Every pass is an all-to-all between them, so all ranks run the same
number of passes per step, idle ranks with a dummy token, until no rank has work.
"""

import torch
from torch import Tensor

from megatron_q3n.model.decode.forward import compute_logits, extend, extend_mtp
from megatron_q3n.model.decode.fused_linear import norm_and_logits
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.decode.state import DecodeState


class ModelRunner:
    """Runs the trunk and the MTP layer, and the collectives between ranks."""

    def __init__(self, model: DecodeModel, draft_depth: int) -> None:
        self.model, self.draft_depth = model, draft_depth
        self.device = next(model.parameters()).device
        self._tp_group, self._tp_ep_group = model.pg_collection.tp, model.pg_collection.tp_ep
        self._num_trunk_passes = self._num_mtp_passes = 0

    def empty_state(self, num_sequences: int) -> DecodeState:
        """Return the decode state of sequences without tokens."""
        return DecodeState.empty(self.model, num_sequences)

    def span(self, starts: list[int], counts: list[int]) -> Span:
        """Return a span on this device."""
        return Span(starts, counts, self.device)

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part in a pass."""
        return self._tp_ep_group.size() == self._tp_group.size() == 1

    def run_trunk(self, tokens_S: Tensor, span: Span, state: DecodeState, **options: bool) -> Tensor:
        """Run the trunk, once per step; arguments and result as `decode.forward.extend`."""
        self._num_trunk_passes += 1
        return extend(self.model, tokens_S, span, state, **options)

    def run_mtp_layer(
        self, hidden_SX: Tensor, next_tokens_S: Tensor, span: Span, state: DecodeState, **options: bool
    ) -> Tensor:
        """Run the MTP layer, at most `draft_depth` times per step; arguments as `decode.forward.extend_mtp`."""
        self._num_mtp_passes += 1
        return extend_mtp(self.model, hidden_SX, next_tokens_S, span, state, **options)

    def norm_and_logits(self, hidden_SX: Tensor, *, mtp: bool = False) -> tuple[Tensor, Tensor]:
        """Apply the final norm of the trunk, or of the MTP layer, and the output layer.

        Returns: normalized hidden states [S,X], and logits [S,V] in the model's dtype.
        """
        norm = self.model.mtp.layers[0].final_layernorm if mtp else self.model.decoder.final_norm
        return norm_and_logits(self.model, norm, hidden_SX)

    def compute_logits(self, hidden_SX: Tensor) -> Tensor:
        """Return fp32 logits [S,V]."""
        return compute_logits(self.model, hidden_SX)

    def run_dummy_passes(self) -> None:
        """Run the passes of this step that this rank did not need, with a dummy token, for the other ranks."""
        if self._tp_ep_group.size() > 1:
            token, span = self.token_tensor([0]), self.span([0], [1])
            if not self._num_trunk_passes:
                self.run_trunk(token, span, self.empty_state(1))
            while self._num_mtp_passes < self.draft_depth:
                hidden = torch.zeros_like(self.model.decoder.final_norm.weight)[None]
                self.run_mtp_layer(hidden, token, span, self.empty_state(1))
        self._num_trunk_passes = self._num_mtp_passes = 0

    def any_rank_has_work(self, has_work: bool) -> bool:
        """Return whether any rank that shares experts with this one has work. A collective call."""
        if self._tp_ep_group.size() == 1:
            return has_work
        num_busy = torch.tensor([float(has_work)], device=self.device)
        torch.distributed.all_reduce(num_busy, group=self._tp_ep_group)
        return num_busy.item() > 0

    def broadcast_from_first_tp_rank(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with that of the first tensor-parallel rank, and return it."""
        if self._tp_group.size() > 1:
            torch.distributed.broadcast(tensor, group=self._tp_group, group_src=0)
        return tensor

    def token_tensor(self, ids: list[int]) -> Tensor:
        """Return integers on this device, int64."""
        return torch.tensor(ids, dtype=torch.long).to(self.device, non_blocking=True)

    def uniform_tensor(self, rows: list[list[float]]) -> Tensor:
        """Return random numbers on this device, fp64."""
        return torch.tensor(rows, dtype=torch.float64).to(self.device, non_blocking=True)
