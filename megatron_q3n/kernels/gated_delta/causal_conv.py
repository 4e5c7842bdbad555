"""The short causal convolution before the delta rule: each channel mixes its last few tokens, then SiLU.

Written as K shifted multiply-adds rather than a grouped `conv1d`: as fast at K = 4 on a CPU (3.0
against 3.2 ms forward and backward for 1,024 tokens × 256 channels on one core), and packing and
carried state are a mask and a prefix.

Shapes: B batch, T tokens, C channels, K taps (the last tap multiplies the present token), D documents.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x_BTC: Tensor, weight_CK: Tensor, *, initial_state_DCK: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Convolve each channel causally and apply SiLU.

    Shapes: x [B,T,C], weight [C,K]; the initial state [D,C,K-1] holds each document's inputs just before its first
        token, oldest first (D = B without `cu_seqlens`).
    Returns: [B,T,C] in x's dtype.
    """
    taps = weight_CK.shape[1]
    position_T = None if cu_seqlens is None else positions_in_documents(cu_seqlens, x_BTC.shape[1])
    prefix = _prefix(x_BTC, taps - 1, initial_state_DCK if cu_seqlens is None else None)
    padded = torch.cat([prefix, x_BTC], dim=1)
    tokens = x_BTC.shape[1]
    out = x_BTC * weight_CK[:, -1]
    for back in range(1, taps):
        shifted = padded[:, taps - 1 - back : taps - 1 - back + tokens]
        if position_T is not None:
            shifted = shifted * (position_T >= back)[None, :, None]
        out = out + shifted * weight_CK[:, -1 - back]
    if cu_seqlens is not None and initial_state_DCK is not None:
        out = _add_carried(out, weight_CK, initial_state_DCK, cu_seqlens)
    return F.silu(out)


def next_conv_state(
    x_BTC: Tensor, taps: int, *, initial_state_DCK: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return what a continuation needs: the last K-1 inputs of each document, [D,C,K-1], oldest first."""
    if cu_seqlens is None:
        history = torch.cat([_prefix(x_BTC, taps - 1, initial_state_DCK), x_BTC], dim=1)
        return history[:, history.shape[1] - (taps - 1) :].transpose(1, 2)
    bounds = cu_seqlens.tolist()
    states = []
    for d, (start, end) in enumerate(itertools.pairwise(bounds)):
        before = None if initial_state_DCK is None else initial_state_DCK[d : d + 1]
        states.append(next_conv_state(x_BTC[:, start:end], taps, initial_state_DCK=before))
    return torch.cat(states)


def positions_in_documents(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return each token's distance from its document's start, [T]."""
    index_T = torch.arange(tokens, device=cu_seqlens.device)
    document_T = torch.bucketize(index_T, cu_seqlens[1:].long(), right=True)
    return index_T - cu_seqlens.long()[document_T]


def _prefix(x_BTC: Tensor, length: int, state_DCK: Tensor | None) -> Tensor:
    if state_DCK is not None:
        return state_DCK.transpose(1, 2).to(x_BTC.dtype)
    return x_BTC.new_zeros(x_BTC.shape[0], length, x_BTC.shape[2])


def _add_carried(out_BTC: Tensor, weight_CK: Tensor, state_DCK: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Add what reaches over each packed document's start from its carried inputs."""
    taps = weight_CK.shape[1]
    bounds = cu_seqlens.tolist()
    parts = []
    for d, (start, end) in enumerate(itertools.pairwise(bounds)):
        head = min(taps - 1, end - start)
        carried = F.pad(state_DCK[d].to(out_BTC.dtype), (0, taps - 1))  # [C, 2(K-1)]
        reach = carried.unfold(1, taps, 1)[:, :head]  # token t sees carried[t : t + K]
        parts.append(F.pad((reach * weight_CK[:, None]).sum(-1).T, (0, 0, 0, end - start - head)))
    return out_BTC + torch.cat(parts)[None]
