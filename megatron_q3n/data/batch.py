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
            cu_seqlens=None
            if self.cu_seqlens is None
            else self.cu_seqlens.to(device, non_blocking=True),
        )


def batch_of_rows(
    tokens_BT: torch.Tensor, labels_BT: torch.Tensor, loss_mask_BT: torch.Tensor
) -> Batch:
    """Make a batch of plain causal rows."""
    positions_T = torch.arange(tokens_BT.shape[1])
    return Batch(tokens_BT, labels_BT, loss_mask_BT, positions_T.expand_as(tokens_BT).contiguous())


def batch_of_documents(
    tokens_1T: torch.Tensor, labels_1T: torch.Tensor, loss_mask_1T: torch.Tensor, eod: int
) -> Batch:
    """Make a batch of one row whose documents do not see each other.

    A document ends after each `eod`. Positions start anew, and the end-of-document token is not asked to
    predict the unrelated document behind it.
    """
    (length,) = tokens_1T[0].shape
    ends = (tokens_1T[0] == eod).nonzero()[:, 0] + 1
    inner_ends = ends[ends < length]
    edges = torch.tensor([0, *inner_ends.tolist(), length])
    lengths = edges.diff()
    starts_T = torch.repeat_interleave(edges[:-1], lengths)
    return Batch(
        tokens_1T,
        labels_1T,
        loss_mask_1T * (tokens_1T != eod),
        (torch.arange(length) - starts_T)[None],
        cu_seqlens=edges.to(torch.int32),
        max_seqlen=int(lengths.max()),
    )
