"""What the model is fed: one micro-batch of rows, or one row of packed documents.

B rows of a micro-batch, T tokens of a row. Packed documents (`cu_seqlens`) come as a single row, B = 1.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Batch:
    """Tokens, what follows each, which predictions count, and where documents begin.

    Shapes: tokens_BT, labels_BT, position_ids_BT (B, T) int64; loss_mask_BT (B, T) float32 of 0 and 1;
        cu_seqlens (documents + 1,) int32 from 0 to B·T, None when rows are plain causal sequences;
        max_seqlen the longest document in tokens, None likewise.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None

    def __post_init__(self) -> None:
        packed = self.cu_seqlens is not None
        assert packed == (self.max_seqlen is not None), "cu_seqlens and max_seqlen come together"
        assert not packed or self.tokens_BT.shape[0] == 1, "packed documents are one row"

    @property
    def num_loss_tokens(self) -> torch.Tensor:
        """Number of predictions that count, as an int64 scalar on the batch's device (no synchronisation)."""
        return self.loss_mask_BT.count_nonzero()

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device; from pinned memory the copy overlaps with computation."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            loss_mask_BT=self.loss_mask_BT.to(device, non_blocking=True),
            position_ids_BT=self.position_ids_BT.to(device, non_blocking=True),
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True),
        )


def batch_of_rows(tokens_BT: torch.Tensor, labels_BT: torch.Tensor, loss_mask_BT: torch.Tensor) -> Batch:
    """Make a batch of plain causal rows."""
    positions_T = torch.arange(tokens_BT.shape[1])
    return Batch(tokens_BT, labels_BT, loss_mask_BT, positions_T.expand_as(tokens_BT).contiguous())


def batch_of_documents(
    tokens_1T: torch.Tensor, labels_1T: torch.Tensor, loss_mask_1T: torch.Tensor, eod: int, alignment: int = 1
) -> Batch:
    """Make a batch of one row whose documents do not see each other.

    A document ends after each `eod`. Positions start anew, and the end-of-document token is not asked to
    predict the unrelated document behind it. With an alignment, each document is padded to a multiple
    of it with unasked `eod`s, and what then reaches over the row's end is left out.
    """
    (length,) = tokens_1T[0].shape
    assert length % alignment == 0, "the configuration refuses this"
    ends = (tokens_1T[0] == eod).nonzero()[:, 0] + 1
    edges = torch.tensor([0, *ends[ends < length].tolist(), length])
    padded = (edges.diff() + alignment - 1) // alignment * alignment
    new_edges = torch.cat([edges[:1], padded.cumsum(0)])
    moved_by_T = torch.repeat_interleave(new_edges[:-1] - edges[:-1], edges.diff())
    place_T = torch.arange(length) + moved_by_T
    kept_T = place_T < length
    place_T = place_T[kept_T]

    def laid_out(row_1T: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.full_like(row_1T, fill).index_copy(1, place_T, row_1T[:, kept_T])

    asked_1T = loss_mask_1T * (tokens_1T != eod)
    bounds = torch.cat([new_edges[new_edges < length], torch.tensor([length])])
    starts_T = torch.repeat_interleave(bounds[:-1], bounds.diff())
    return Batch(
        laid_out(tokens_1T, eod),
        laid_out(labels_1T, eod),
        laid_out(asked_1T, 0),
        (torch.arange(length) - starts_T)[None],
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=int(bounds.diff().max()),
    )
