"""Decode argmax: greedy verification of draft tokens, the next token, and log probabilities, from the logits.

Everything stays on the device, since the decode step continues from it. Fused it is two launches: the logits are read
once, in blocks of the vocabulary, and one program per sequence combines its blocks. From torch operations it is some
thirty launches. Of equal logits the lower token id wins.

Shapes: N sequences, D drafts of each, T = D + 1, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels.norms import accumulation_dtype


@dataclass(frozen=True)
class VerifiedDrafts:
    """Result of verifying each sequence's drafts.

    Shapes: `packed` [N,1+3T] fp64: number of accepted drafts, the tokens (valid up to the new one), their log
        probabilities, T zeros; `chosen` the same tokens [N,T]; `num_new_tokens` [N], accepted drafts plus the new
        token; `row` [N], index of the new token's logits among all N·T.
    """

    packed: Tensor
    chosen_NT: Tensor
    num_new_tokens_N: Tensor
    row_N: Tensor


def verify_greedy(
    logits_NTV: Tensor, drafts_ND: Tensor, vocab_size: int | None = None, fused: bool = False
) -> VerifiedDrafts:
    """Accept drafts as long as they are the argmax, and take the argmax after them as the new token.

    Shapes: logits [N,T,V] of any dtype; token ids from `vocab_size` on, which pad the vocabulary, are never taken.
        `fused` runs the Triton kernel instead of the reference.
    """
    if fused:
        from megatron_q3n.kernels.decode import argmax_triton as kernel  # late: Triton

        limit = min(vocab_size or logits_NTV.shape[-1], logits_NTV.shape[-1])
        return VerifiedDrafts(*kernel.verify_greedy(logits_NTV.contiguous(), drafts_ND, limit))
    logits = logits_NTV.to(accumulation_dtype(logits_NTV))
    argmax_NT = logits[..., :vocab_size].argmax(-1)
    num_accepted_N = (argmax_NT[:, :-1] == drafts_ND).int().cumprod(1).sum(1)
    new_token_N1 = argmax_NT.gather(1, num_accepted_N[:, None])
    chosen_NT = F.pad(drafts_ND, (0, 1)).scatter(1, num_accepted_N[:, None], new_token_N1)
    logprob_NT = logits.log_softmax(-1).gather(-1, chosen_NT[..., None]).squeeze(-1)
    parts = num_accepted_N[:, None], chosen_NT, logprob_NT, torch.zeros_like(logprob_NT)
    packed = torch.cat([part.double() for part in parts], 1)
    rows, tokens = argmax_NT.shape
    row_N = torch.arange(rows, device=num_accepted_N.device) * tokens + num_accepted_N
    return VerifiedDrafts(packed, chosen_NT, num_accepted_N + 1, row_N)


def greedy_token(logits_NV: Tensor, out_N: Tensor, vocab_size: int | None = None, fused: bool = False) -> None:
    """Write the argmax of each row, among ids below `vocab_size`, into `out` of any stride."""
    limit = min(vocab_size or logits_NV.shape[-1], logits_NV.shape[-1])
    if fused:
        from megatron_q3n.kernels.decode import argmax_triton as kernel  # late: Triton

        kernel.greedy_token(logits_NV, out_N, limit)
    else:
        torch.argmax(logits_NV[..., :limit], -1, out=out_N)
