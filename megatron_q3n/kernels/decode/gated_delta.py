"""A few tokens of Gated DeltaNet from a carried state, keeping the state after each: decoding, and verifying drafts.

A draft that is refused must be forgotten, and a recurrent state cannot be shortened. So the states
after every one of the few tokens are handed out, and the caller keeps the right one. Fused, it is one
launch for everything between the projections, which is what a token costs on a GPU: the composed form
makes some fifty.

Shapes: T tokens, B sequences, X projection channels, C = q|k|v channels; heads as in kernels/gated_delta/mixer.py.
"""

import torch
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.gated_delta.mixer import DeltaHeads, DeltaWeights, delta_rule_inputs
from megatron_q3n.kernels.norms import gated_rms_norm

OPERATION = "gated delta net, few tokens"


def delta_steps(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    conv_BCK: Tensor,
    delta_BHKV: Tensor,
    fused: bool | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix T tokens of B sequences; `fused` forces the choice that `choices` makes otherwise.

    Shapes: the state is conv [B,C,taps-1] and delta [B,Hv,K,V] fp32. `out` is contiguous room for the states
        returned, not that of those given.
    Returns: the output [T,B,Hv·V], normed and gated; the conv and delta states after each token, of
        B·T rows, those of a sequence together.
    """
    fits = heads.key_dim == heads.value_dim and heads.key_dim & (heads.key_dim - 1) == 0
    if registry.is_fused(OPERATION, qkvz_TBX, fused) and fits:
        from megatron_q3n.kernels.decode import gated_delta_triton as kernel  # late: Triton

        return kernel.delta_steps(qkvz_TBX, beta_alpha_TBX, weights, heads, conv_BCK, delta_BHKV, out)
    mixed, *states = composed_delta_steps(qkvz_TBX, beta_alpha_TBX, weights, heads, conv_BCK, delta_BHKV)
    if out is not None:
        states = [room.copy_(state) for room, state in zip(out, states, strict=True)]
    return mixed, states[0], states[1]


def composed_delta_steps(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    conv_BCK: Tensor,
    delta_BHKV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do it from torch operations, token by token as the rule is defined (kernels/gated_delta/delta_rule.py)."""
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
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    repeat = value.shape[2] // key.shape[2]
    q, k = (x.to(wide).repeat_interleave(repeat, dim=2) for x in (query, key))
    q, v = q * key.shape[-1] ** -0.5, value.to(wide)
    keep, beta = decay.to(wide).exp()[..., None, None], beta.to(wide)[..., None]
    state = state_BHKV.to(wide)
    outputs, states = [], []
    for t in range(v.shape[1]):
        state = state * keep[:, t]
        recalled = (k[:, t, :, None] @ state).squeeze(2)
        correction = (v[:, t] - recalled) * beta[:, t]
        state = state + k[:, t, :, :, None] * correction[:, :, None]
        outputs.append((q[:, t, :, None] @ state).squeeze(2))
        states.append(state)
    return torch.stack(outputs, 1).to(value.dtype), torch.stack(states, 1)
