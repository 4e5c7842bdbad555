"""What greedy decoding reads off the logits of a few tokens: drafts judged, the next token, log probabilities.

On the device, since the round goes on from it, and two launches fused: the logits are read once, in
pieces, and every sequence then has one program that puts its pieces together. From torch operations it is some thirty.
Of equal logits the lower token counts as likelier.

Shapes: N sequences, D drafts of each, T = D + 1, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import registry

OPERATION = "greedy choice"
# of a vocabulary that one program reads at once; a larger one is spread over the GPU by torch
_MOST_AT_ONCE = 2**14


@dataclass(frozen=True)
class Judged:
    """What became of each sequence's drafts.

    Shapes: `packed` [N,1+3T] fp64: drafts kept, the tokens chosen (meaningful up to the one drawn), their log
        probabilities, T zeros; `chosen` the same tokens [N,T]; `grown` [N], tokens that the sequence grows by;
        `row` [N], the last of these among all N·T.
    """

    packed: Tensor
    chosen_NT: Tensor
    grown_N: Tensor
    row_N: Tensor


def judge_likeliest(
    logits_NTV: Tensor, drafts_ND: Tensor, vocab_size: int | None = None, fused: bool | None = None
) -> Judged:
    """Keep drafts as long as they are the likeliest tokens, and take the likeliest after them.

    Shapes: logits [N,T,V] of any format; tokens from `vocab_size` on, which pad the vocabulary, are never taken.
        `fused` forces the choice that `choices` makes otherwise.
    """
    if registry.is_fused(OPERATION, logits_NTV, fused):
        from megatron_q3n.kernels.decode import argmax_triton as kernel  # late: Triton

        limit = min(vocab_size or logits_NTV.shape[-1], logits_NTV.shape[-1])
        return Judged(*kernel.judge_likeliest(logits_NTV.contiguous(), drafts_ND, limit))
    logits = logits_NTV if logits_NTV.dtype == torch.float64 else logits_NTV.float()
    best_NT = logits[..., :vocab_size].argmax(-1)
    kept_N = (best_NT[:, :-1] == drafts_ND).int().cumprod(1).sum(1)
    drawn_N1 = best_NT.gather(1, kept_N[:, None])
    chosen_NT = F.pad(drafts_ND, (0, 1)).scatter(1, kept_N[:, None], drawn_N1)
    own_NT = logits.log_softmax(-1).gather(-1, chosen_NT[..., None]).squeeze(-1)
    parts = kept_N[:, None], chosen_NT, own_NT, torch.zeros_like(own_NT)
    packed = torch.cat([part.double() for part in parts], 1)
    rows, tokens = best_NT.shape
    row_N = torch.arange(rows, device=kept_N.device) * tokens + kept_N
    return Judged(packed, chosen_NT, kept_N + 1, row_N)


def take_likeliest(logits_NV: Tensor, out_N: Tensor, vocab_size: int | None = None, fused: bool | None = None) -> None:
    """Write the likeliest token of each row, below `vocab_size`, where `out` lies, at whatever stride."""
    limit = min(vocab_size or logits_NV.shape[-1], logits_NV.shape[-1])
    if registry.is_fused(OPERATION, logits_NV, fused) and limit <= _MOST_AT_ONCE:
        from megatron_q3n.kernels.decode import argmax_triton as kernel  # late: Triton

        kernel.take_likeliest(logits_NV, out_N, limit)
    else:
        torch.argmax(logits_NV[..., :limit], -1, out=out_N)
