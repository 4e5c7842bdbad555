"""Many experts' matrix products in one call: rows sorted by expert, one weight matrix per expert."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(rows_TK: Tensor, weight_ENK: Tensor, rows_per_expert_E: Tensor) -> Tensor:
    """Multiply each expert's block of rows with its own matrix.

    On a GPU in bf16 this is one launch for all experts (`torch._grouped_mm`, whose offsets stay on
    the device); elsewhere a loop over experts, which is right for the few and small experts of a
    laptop run.

    Shapes: rows [T,K], the first rows_per_expert[0] of them for expert 0, and so on; weight [E,N,K].
    Returns: [T,N].
    """
    if rows_TK.is_cuda and rows_TK.dtype == torch.bfloat16:
        ends_E = rows_per_expert_E.to(rows_TK.device).cumsum(0).to(torch.int32)
        return torch._grouped_mm(rows_TK, weight_ENK.transpose(1, 2), offs=ends_E)
    blocks = rows_TK.split(rows_per_expert_E.tolist())
    return torch.cat(
        [F.linear(block, weight) for block, weight in zip(blocks, weight_ENK.unbind())]
    )
