# mypy: allow-untyped-defs
"""Decode experts in two kernels, which read every selected expert's weights in place, once.

**Hidden** (grid: tokens·slots × cdiv(F, BLOCK_F)): SiLU(x·W_gate) · (x·W_up) · gate for BLOCK_F hidden values of one
slot. A slot is one selected expert of a token; the shared expert is one more, whose gate sigmoid(x·w) is computed here.

**Output** (grid: tokens × cdiv(X, BLOCK_X)): BLOCK_X outputs of a token, summed over its slots in fp32 and in slot
order, plus the residual (epilogue). The result does not depend on timing.

BLOCK_K inputs are read at a time. Each weight is used for one multiply-add, so these are matrix-vector products bound
by memory; no tensor cores.

Shapes: T tokens, K slots of each and the shared one, F and FS hidden sizes of an expert and the shared expert, X width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.decode.operands import ExpertWeights

# weight rows of a program: small, so that a few tokens fill the whole GPU
_BLOCK_F, _BLOCK_X = 8, 4
_MAX_BLOCK_K = 512


@triton.jit
def _hidden_kernel(
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
    MAX_F: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token, slot = tl.program_id(0) // (SLOTS + (FS > 0)), tl.program_id(0) % (SLOTS + (FS > 0))
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    routed_slot = token * SLOTS + tl.minimum(slot, SLOTS - 1)
    weight_ptr = fc1_ptr + tl.load(experts_ptr + routed_slot).to(tl.int64) * 2 * F * X
    gate = tl.load(gates_ptr + routed_slot).to(tl.float32)
    width = F
    if FS > 0:
        if slot == SLOTS:
            weight_ptr = shared_fc1_ptr
            width = FS
        gate = tl.where(slot == SLOTS, 1.0, gate)
        if ALIGNED:
            # the branch hides the alignment from the compiler: 16 bytes a load instead of 2
            weight_ptr = tl.multiple_of(weight_ptr, 16)
    mask_f = (f < width)[:, None]
    # partial sums per thread; they are reduced across threads once, at the end
    gate_sum = tl.zeros((BLOCK_F, BLOCK_K), tl.float32)
    up_sum = tl.zeros((BLOCK_F, BLOCK_K), tl.float32)
    shared_gate_sum = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, X, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token * X + i, mask=i < X, other=0.0).to(tl.float32)
        mask = mask_f & (i < X)[None, :]
        ptr = weight_ptr + f[:, None] * X + i[None, :]
        gate_sum += tl.load(ptr, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        up_sum += tl.load(ptr + width * X, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        if HAS_GATE:
            shared_gate_sum += tl.load(shared_gate_ptr + i, mask=i < X, other=0.0).to(tl.float32) * x
    if HAS_GATE:
        gate = tl.where(slot == SLOTS, tl.sigmoid(tl.sum(shared_gate_sum, axis=0)), gate)
    gate_total, up_total = tl.sum(gate_sum, axis=1), tl.sum(up_sum, axis=1)
    hidden = gate_total * tl.sigmoid(gate_total) * up_total * gate
    ptr = out_ptr + tl.program_id(0) * MAX_F + f
    tl.store(ptr, hidden.to(out_ptr.dtype.element_ty), mask=f < width)


@triton.jit
def _output_kernel(
    hidden_ptr,
    experts_ptr,
    fc2_ptr,
    shared_fc2_ptr,
    residual_ptr,
    out_ptr,
    X,
    SLOTS: tl.constexpr,
    F: tl.constexpr,
    FS: tl.constexpr,
    MAX_F: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0)
    out = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = (out < X)[:, None]
    total = tl.zeros((BLOCK_X, BLOCK_K), tl.float32)
    for slot in tl.static_range(SLOTS):
        expert = tl.load(experts_ptr + token * SLOTS + slot).to(tl.int64)
        for start in tl.static_range(0, F, BLOCK_K):
            f = start + tl.arange(0, BLOCK_K)
            hidden = tl.load(hidden_ptr + (token * (SLOTS + (FS > 0)) + slot) * MAX_F + f, mask=f < F, other=0.0)
            ptr = fc2_ptr + expert * X * F + out[:, None] * F + f[None, :]
            weight = tl.load(ptr, mask=mask_x & (f < F)[None, :], other=0.0)
            total += weight.to(tl.float32) * hidden.to(tl.float32)[None, :]
    for start in tl.static_range(0, FS, BLOCK_K):
        f = start + tl.arange(0, BLOCK_K)
        hidden = tl.load(hidden_ptr + (token * (SLOTS + 1) + SLOTS) * MAX_F + f, mask=f < FS, other=0.0)
        ptr = shared_fc2_ptr + out[:, None] * FS + f[None, :]
        weight = tl.load(ptr, mask=mask_x & (f < FS)[None, :], other=0.0)
        total += weight.to(tl.float32) * hidden.to(tl.float32)[None, :]
    offset = token * X + out
    residual = tl.load(residual_ptr + offset, mask=out < X, other=0.0).to(tl.float32)
    total_x = tl.sum(total, axis=1) + residual
    tl.store(out_ptr + offset, total_x.to(out_ptr.dtype.element_ty), mask=out < X)


def decode_experts(
    x_TX: Tensor, residual_TX: Tensor, experts_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Launch both kernels; arguments as `experts.decode_experts`. Without gradients.

    Shapes: x, residual [T,X]; experts and gates [T,K]; all contiguous.
    Returns: [T,X], a new tensor like the residual.
    """
    (tokens, width), slots, num_hidden = x_TX.shape, experts_TK.shape[1], weights.fc2.shape[2]
    num_shared_hidden = 0 if weights.shared_fc2 is None else weights.shared_fc2.shape[1]
    max_hidden, slots_per_token = max(num_hidden, num_shared_hidden), slots + (num_shared_hidden > 0)
    hidden = x_TX.new_empty(tokens * slots_per_token, max_hidden)
    shapes = {"SLOTS": slots, "F": num_hidden, "FS": num_shared_hidden, "MAX_F": max_hidden, "num_warps": 4}
    _hidden_kernel[(tokens * slots_per_token, triton.cdiv(max_hidden, _BLOCK_F))](
        x_TX,
        experts_TK,
        gates_TK,
        weights.fc1,
        weights.shared_fc1,
        weights.shared_gate,
        hidden,
        width,
        HAS_GATE=weights.shared_gate is not None,
        ALIGNED=width * x_TX.element_size() % 16 == 0,
        BLOCK_F=_BLOCK_F,
        BLOCK_K=min(_MAX_BLOCK_K, triton.next_power_of_2(width)),
        **shapes,
    )
    out = torch.empty_like(residual_TX)
    _output_kernel[(tokens, triton.cdiv(width, _BLOCK_X))](
        hidden,
        experts_TK,
        weights.fc2,
        weights.shared_fc2,
        residual_TX,
        out,
        width,
        BLOCK_X=_BLOCK_X,
        BLOCK_K=min(_MAX_BLOCK_K, triton.next_power_of_2(num_hidden)),
        **shapes,
    )
    return out
