"""Causal depthwise conv1d before the delta rule: each channel mixes its last few tokens, then SiLU.

Written as K shifted multiply-adds instead of a grouped `conv1d`: as fast at K = 4 on a CPU (3.0 against 3.2 ms forward
and backward for 1,024 tokens × 256 channels on one core), and packed documents and a carried state are a mask and a
prefix.

Shapes: B batch, T tokens, C channels, K conv1d kernel size (the last weight multiplies the current token), D documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.packing import Packing


def causal_conv(
    x_BTC: Tensor, weight_CK: Tensor, *, initial_state_DCK: Tensor | None = None, packing: Packing | None = None
) -> Tensor:
    """Convolve each channel causally and apply SiLU.

    Shapes: x [B,T,C], weight [C,K]; the initial state [D,C,K-1] holds each document's inputs just before its first
        token, oldest first (D = B without `packing`).
    Returns: [B,T,C] in x's dtype.
    """
    kernel_size = weight_CK.shape[1]
    position_T = None if packing is None else packing.position_T
    prefix = _prefix(x_BTC, kernel_size - 1, initial_state_DCK if packing is None else None)
    padded = torch.cat([prefix, x_BTC], dim=1)
    tokens = x_BTC.shape[1]
    acc = x_BTC * weight_CK[:, -1]
    for lag in range(1, kernel_size):
        shifted = padded[:, kernel_size - 1 - lag : kernel_size - 1 - lag + tokens]
        if position_T is not None:
            shifted = shifted * (position_T >= lag)[None, :, None]
        acc = acc + shifted * weight_CK[:, -1 - lag]
    if packing is not None and initial_state_DCK is not None:
        acc = _add_carried(acc, weight_CK, initial_state_DCK, packing)
    return F.silu(acc)


def next_conv_state(
    x_BTC: Tensor, kernel_size: int, *, initial_state_DCK: Tensor | None = None, packing: Packing | None = None
) -> Tensor:
    """Return the convolution state for a continuation: the last K-1 inputs of each document [D,C,K-1], oldest first."""
    if packing is None:
        history = torch.cat([_prefix(x_BTC, kernel_size - 1, initial_state_DCK), x_BTC], dim=1)
        return history[:, history.shape[1] - (kernel_size - 1) :].transpose(1, 2)
    states = []
    for d, (start, end) in enumerate(packing.spans):
        initial = None if initial_state_DCK is None else initial_state_DCK[d : d + 1]
        states.append(next_conv_state(x_BTC[:, start:end], kernel_size, initial_state_DCK=initial))
    return torch.cat(states)


def _prefix(x_BTC: Tensor, length: int, state_DCK: Tensor | None) -> Tensor:
    if state_DCK is not None:
        return state_DCK.transpose(1, 2).to(x_BTC.dtype)
    return x_BTC.new_zeros(x_BTC.shape[0], length, x_BTC.shape[2])


def _add_carried(out_BTC: Tensor, weight_CK: Tensor, state_DCK: Tensor, packing: Packing) -> Tensor:
    """Add the contribution of the carried inputs to the first tokens of each packed document."""
    kernel_size = weight_CK.shape[1]
    parts = []
    for d, (start, end) in enumerate(packing.spans):
        num_affected = min(kernel_size - 1, end - start)
        carried = F.pad(state_DCK[d].to(out_BTC.dtype), (0, kernel_size - 1))  # [C, 2(K-1)]
        # the window of token t is carried[t : t + K]
        windows = carried.unfold(1, kernel_size, 1)[:, :num_affected]
        parts.append(F.pad((windows * weight_CK[:, None]).sum(-1).T, (0, 0, 0, end - start - num_affected)))
    return out_BTC + torch.cat(parts)[None]
