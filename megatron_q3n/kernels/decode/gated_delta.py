"""Decode Gated DeltaNet step: a few tokens from a carried state, with the state after each token.

Used for decoding and for verifying draft tokens. A rejected draft must be rolled back, and a recurrent state cannot
be truncated as a KV cache can. So the states after each of the tokens are returned, and the caller commits the right
one. Fused, it is one launch for everything between the projections, which is what determines the time of a token on a
GPU; the reference makes some fifty.

Reference: Gated Delta Networks (arXiv 2412.06464), eq. 10.
Shapes: T tokens, B sequences, X projection channels, C = q|k|v channels; heads as in kernels/gated_delta/mixer.py.
"""

import torch
from torch import Tensor

from megatron_q3n.kernels.gated_delta.mixer import delta_rule_inputs
from megatron_q3n.kernels.gated_delta.operands import DeltaHeads, DeltaWeights
from megatron_q3n.kernels.norms import accumulation_dtype, gated_rms_norm


def decode_gated_delta(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    conv_BCK: Tensor,
    delta_BHKV: Tensor,
    fused: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix T tokens of B sequences; `fused` runs the Triton kernel instead of the reference.

    Shapes: the state is conv [B,C,conv1d kernel size - 1] and delta [B,Hv,K,V] fp32. `out` are contiguous buffers for
        the returned states, other than the memory of the input states.
    Returns: the output [T,B,Hv·V], normed and gated; the conv and delta states after each token, with B·T rows, the
        tokens of a sequence together.
    """
    if fused:
        from megatron_q3n.kernels.decode import gated_delta_triton as kernel  # late: Triton

        return kernel.decode_gated_delta(qkvz_TBX, beta_alpha_TBX, weights, heads, conv_BCK, delta_BHKV, out)
    mixed, *states = decode_gated_delta_reference(qkvz_TBX, beta_alpha_TBX, weights, heads, conv_BCK, delta_BHKV)
    if out is not None:
        states = [buffer.copy_(state) for buffer, state in zip(out, states, strict=True)]
    return mixed, states[0], states[1]


def decode_gated_delta_reference(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    conv_BCK: Tensor,
    delta_BHKV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step from torch operations, token by token: the recurrence of kernels/gated_delta/delta_rule.py."""
    qkv_BTC, z, inputs = delta_rule_inputs(
        qkvz_TBX.transpose(0, 1), beta_alpha_TBX.transpose(0, 1), weights, heads, conv_BCK, None
    )
    output, states_BTHKV = _recurrence(inputs, delta_BHKV)
    gated = gated_rms_norm(output, z, weights.norm_V, heads.eps)
    history = torch.cat([conv_BCK.transpose(1, 2).to(qkv_BTC.dtype), qkv_BTC], 1)
    windows_BTCK = history.unfold(1, conv_BCK.shape[2], 1)[:, 1:]
    return (gated.flatten(2).transpose(0, 1).contiguous(), windows_BTCK.flatten(0, 1), states_BTHKV.flatten(0, 1))


def _recurrence(inputs: list[Tensor], state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the delta rule token by token. Returns the outputs [B,T,Hv,V] and the states [B,T,Hv,K,V]."""
    query, key, value, decay, beta = inputs
    dtype = accumulation_dtype(value)
    repeat = value.shape[2] // key.shape[2]
    q, k = (x.to(dtype).repeat_interleave(repeat, dim=2) for x in (query, key))
    q, v = q * key.shape[-1] ** -0.5, value.to(dtype)
    decay_factor, beta = decay.to(dtype).exp()[..., None, None], beta.to(dtype)[..., None]
    state = state_BHKV.to(dtype)
    outputs, states = [], []
    for t in range(v.shape[1]):
        state = state * decay_factor[:, t]
        recalled = (k[:, t, :, None] @ state).squeeze(2)
        correction = (v[:, t] - recalled) * beta[:, t]
        state = state + k[:, t, :, :, None] * correction[:, :, None]
        outputs.append((q[:, t, :, None] @ state).squeeze(2))
        states.append(state)
    return torch.stack(outputs, 1).to(value.dtype), torch.stack(states, 1)
