# mypy: allow-untyped-defs
"""The experts of a few tokens in two launches: every chosen expert's weights are read where they lie, once.

The first kernel makes each slot's hidden values, SiLU(gate) · up · the router's gate; the second multiplies them with
the experts' second matrices and adds up a token's slots, the shared expert and the residual stream, in
fp32 and in slot order, so that the result never depends on timing. The shared expert is one slot more, whose gate the
first kernel computes. Such products read a weight for every multiplication and are bound by that; no tensor cores.

T tokens, K slots of each and the shared one, F and FS hidden sizes of an expert and the shared expert, X width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.decode.experts import ExpertWeights

# weight rows of a program: small, since few tokens must fill a whole GPU
_BLOCK_F, _BLOCK_X = 8, 4
_INPUTS_AT_ONCE = 512


@triton.jit
def _inside_kernel(
    x_ptr,
    experts_ptr,
    gates_ptr,
    fc1_ptr,
    shared_fc1_ptr,
    shared_gate_ptr,
    out_ptr,
    X,
    SLOTS: tl.constexpr,
    F: tl.constexpr,
    FS: tl.constexpr,
    WIDEST: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, slot = tl.program_id(0) // (SLOTS + (FS > 0)), tl.program_id(0) % (SLOTS + (FS > 0))
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    routed = token * SLOTS + tl.minimum(slot, SLOTS - 1)
    weight_ptr = fc1_ptr + tl.load(experts_ptr + routed).to(tl.int64) * 2 * F * X
    gate = tl.load(gates_ptr + routed).to(tl.float32)
    width = F
    if FS > 0:
        if slot == SLOTS:
            weight_ptr = shared_fc1_ptr
            width = FS
        gate = tl.where(slot == SLOTS, 1.0, gate)
        if ALIGNED:  # which the branch hides from the compiler: 16 bytes a load instead of 2
            weight_ptr = tl.multiple_of(weight_ptr, 16)
    mask_f = (f < width)[:, None]
    # one row per weight row: the sums over inputs are taken at the end, across threads once
    gated = tl.zeros((BLOCK_F, BLOCK), tl.float32)
    up = tl.zeros((BLOCK_F, BLOCK), tl.float32)
    opened = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, X, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * X + i, mask=i < X, other=0.0).to(tl.float32)
        mask = mask_f & (i < X)[None, :]
        place = weight_ptr + f[:, None] * X + i[None, :]
        gated += tl.load(place, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        up += tl.load(place + width * X, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        if HAS_GATE:
            opened += tl.load(shared_gate_ptr + i, mask=i < X, other=0.0).to(tl.float32) * x
    if HAS_GATE:
        gate = tl.where(slot == SLOTS, tl.sigmoid(tl.sum(opened, axis=0)), gate)
    total, raised = tl.sum(gated, axis=1), tl.sum(up, axis=1)
    inner = total * tl.sigmoid(total) * raised * gate
    place = out_ptr + tl.program_id(0) * WIDEST + f
    tl.store(place, inner.to(out_ptr.dtype.element_ty), mask=f < width)


@triton.jit
def _outside_kernel(
    inner_ptr,
    experts_ptr,
    fc2_ptr,
    shared_fc2_ptr,
    residual_ptr,
    out_ptr,
    X,
    SLOTS: tl.constexpr,
    F: tl.constexpr,
    FS: tl.constexpr,
    WIDEST: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    out = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = (out < X)[:, None]
    total = tl.zeros((BLOCK_X, BLOCK), tl.float32)
    for slot in tl.static_range(SLOTS):
        expert = tl.load(experts_ptr + token * SLOTS + slot).to(tl.int64)
        for start in tl.static_range(0, F, BLOCK):
            f = start + tl.arange(0, BLOCK)
            inner = tl.load(inner_ptr + (token * (SLOTS + (FS > 0)) + slot) * WIDEST + f, mask=f < F, other=0.0)
            place = fc2_ptr + expert * X * F + out[:, None] * F + f[None, :]
            weight = tl.load(place, mask=mask_x & (f < F)[None, :], other=0.0)
            total += weight.to(tl.float32) * inner.to(tl.float32)[None, :]
    for start in tl.static_range(0, FS, BLOCK):
        f = start + tl.arange(0, BLOCK)
        inner = tl.load(inner_ptr + (token * (SLOTS + 1) + SLOTS) * WIDEST + f, mask=f < FS, other=0.0)
        place = shared_fc2_ptr + out[:, None] * FS + f[None, :]
        weight = tl.load(place, mask=mask_x & (f < FS)[None, :], other=0.0)
        total += weight.to(tl.float32) * inner.to(tl.float32)[None, :]
    place = token * X + out
    residual = tl.load(residual_ptr + place, mask=out < X, other=0.0).to(tl.float32)
    total_x = tl.sum(total, axis=1) + residual
    tl.store(out_ptr + place, total_x.to(out_ptr.dtype.element_ty), mask=out < X)


def add_few_experts(
    x_TX: Tensor, residual_TX: Tensor, experts_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Add what the chosen experts and the shared one make of each token to the residual. Without gradients.

    Shapes: x, residual [T,X]; experts and gates [T,K]; all contiguous.
    Returns: [T,X], a new tensor like the residual.
    """
    (tokens, width), slots, hidden = x_TX.shape, experts_TK.shape[1], weights.fc2.shape[2]
    shared_hidden = 0 if weights.shared_fc2 is None else weights.shared_fc2.shape[1]
    widest, each = max(hidden, shared_hidden), slots + (shared_hidden > 0)
    inner = x_TX.new_empty(tokens * each, widest)
    sizes = {"SLOTS": slots, "F": hidden, "FS": shared_hidden, "WIDEST": widest, "num_warps": 4}
    _inside_kernel[(tokens * each, triton.cdiv(widest, _BLOCK_F))](
        x_TX,
        experts_TK,
        gates_TK,
        weights.fc1,
        weights.shared_fc1,
        weights.shared_gate,
        inner,
        width,
        HAS_GATE=weights.shared_gate is not None,
        ALIGNED=width * x_TX.element_size() % 16 == 0,
        BLOCK_F=_BLOCK_F,
        BLOCK=min(_INPUTS_AT_ONCE, triton.next_power_of_2(width)),
        **sizes,
    )
    out = torch.empty_like(residual_TX)
    _outside_kernel[(tokens, triton.cdiv(width, _BLOCK_X))](
        inner,
        experts_TK,
        weights.fc2,
        weights.shared_fc2,
        residual_TX,
        out,
        width,
        BLOCK_X=_BLOCK_X,
        BLOCK=min(_INPUTS_AT_ONCE, triton.next_power_of_2(hidden)),
        **sizes,
    )
    return out
