"""Fused backend of the gated delta rule: flash-linear-attention's kernel, which dispatches to FlashQLA where installed.

FLA's Triton backward is silently wrong on Hopper with Triton 3.4 to 3.7.0 (flash-linear-attention issue 640), so it
is used only after its check on this GPU (`kernels/startup/delta_rule_check.py`).
"""

import functools
from collections.abc import Callable

from torch import Tensor

from megatron_q3n.kernels.gated_delta.fla_core import without_models
from megatron_q3n.packing import Packing

Rule = Callable[..., tuple[Tensor, Tensor | None]]
"""The gated delta rule: (query, key, value, decay, beta, **options) → (output, final state or None)."""


def fused_gated_delta_rule(
    query_BTHK: Tensor,
    key_BTHK: Tensor,
    value_BTHV: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_DHKV: Tensor | None = None,
    packing: Packing | None = None,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run flash-linear-attention's kernel, which dispatches to FlashQLA where that is installed."""
    assert chunk_size == 64, "the fused kernels have a chunk of 64"
    output, state = fla_rule()(
        query_BTHK,
        key_BTHK,
        value_BTHV,
        g=decay_BTH,
        beta=beta_BTH.to(value_BTHV.dtype),
        initial_state=initial_state_DHKV,
        output_final_state=output_final_state,
        cu_seqlens=None if packing is None else packing.cu_seqlens_long,
    )
    return output, state


@functools.cache
def fla_rule() -> Rule:
    """Import and return flash-linear-attention's chunked rule; its imports take seconds."""
    # late: fla is not installed on a machine without a GPU
    with without_models():
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule
    return rule
