"""Micro-batch: B causal sequences of T tokens, or one sequence of packed documents (`packing`, B = 1)."""

from dataclasses import dataclass, replace

import torch

from megatron_q3n.packing import Packing


@dataclass(frozen=True)
class Batch:
    """Tokens, labels (the next tokens), loss mask, position ids, and document boundaries.

    Shapes: tokens_BT, labels_BT, position_ids_BT (B, T) int64; loss_mask_BT (B, T) float32 weights of the predictions,
        0 without a loss. The packing is None for plain causal sequences.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    packing: Packing | None = None

    def __post_init__(self) -> None:
        assert self.packing is None or self.tokens_BT.shape[0] == 1, "packed documents are one sequence"

    @property
    def num_loss_tokens(self) -> torch.Tensor:
        """Number of predictions with a loss, an int64 scalar on the batch's device (no host synchronization)."""
        return self.loss_mask_BT.count_nonzero()

    @property
    def num_used_tokens(self) -> int:
        """Number of tokens that are not padding, with or without a loss."""
        return self.tokens_BT.numel() if self.packing is None else self.packing.num_used_tokens

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device; a copy from pinned memory is asynchronous."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            loss_mask_BT=self.loss_mask_BT.to(device, non_blocking=True),
            position_ids_BT=self.position_ids_BT.to(device, non_blocking=True),
            packing=None if self.packing is None else self.packing.to(device),
        )


def causal_batch(tokens_BT: torch.Tensor, labels_BT: torch.Tensor, loss_mask_BT: torch.Tensor) -> Batch:
    """Return a batch of plain causal sequences. Shapes: (B, T) each."""
    positions_T = torch.arange(tokens_BT.shape[1])
    return Batch(tokens_BT, labels_BT, loss_mask_BT, positions_T.expand_as(tokens_BT).contiguous())


def packed_batch(
    tokens_1T: torch.Tensor, labels_1T: torch.Tensor, loss_mask_1T: torch.Tensor, eod: int, alignment: int = 1
) -> Batch:
    """Return a batch of one sequence whose documents do not attend to each other.

    A document ends after each `eod`. Positions restart at 0 in each document, and the prediction after `eod`, the first
    token of an unrelated document, has no loss. With an alignment, each document is padded to a multiple of it with
    `eod` tokens without loss, and the sequence is truncated to its length.

    Shapes: (1, T) each.
    """
    (length,) = tokens_1T[0].shape
    assert length % alignment == 0, "checked by the configuration"
    ends = (tokens_1T[0] == eod).nonzero()[:, 0] + 1
    edges = torch.tensor([0, *ends[ends < length].tolist(), length])
    padded = (edges.diff() + alignment - 1) // alignment * alignment
    new_edges = torch.cat([edges[:1], padded.cumsum(0)])
    shift_T = torch.repeat_interleave(new_edges[:-1] - edges[:-1], edges.diff())
    index_T = torch.arange(length) + shift_T
    is_kept_T = index_T < length
    index_T = index_T[is_kept_T]

    def padded_copy(values_1T: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.full_like(values_1T, fill).index_copy(1, index_T, values_1T[:, is_kept_T])

    mask_1T = loss_mask_1T * (tokens_1T != eod)
    bounds = torch.cat([new_edges[new_edges < length], torch.tensor([length])])
    starts_T = torch.repeat_interleave(bounds[:-1], bounds.diff())
    return Batch(
        padded_copy(tokens_1T, eod),
        padded_copy(labels_1T, eod),
        padded_copy(mask_1T, 0),
        (torch.arange(length) - starts_T)[None],
        packing=Packing.of(bounds.tolist(), used_lengths=_used_lengths(index_T, bounds)),
    )


def _used_lengths(index_T: torch.Tensor, bounds: torch.Tensor) -> list[int]:
    """Return how many of each document's places hold a token of the text, given these tokens' places."""
    return torch.bincount(torch.bucketize(index_T, bounds[1:], right=True), minlength=len(bounds) - 1).tolist()
