"""Gated attention as published: megatron-core's SelfAttention, with the prologue of the attention in one kernel.

Where the plan has `fused_qkv` (kernels/attention/qkv_norm_rope.py), one pass over whole rows splits the projection,
normalizes its heads and applies RoPE, and megatron-core gets no positions to apply. Elsewhere (packed documents, whose
positions start at 0 again; more ranks than key heads; no GPU) everything is megatron-core's.

Shapes: T tokens, B rows, h query heads and kv key/value heads of this rank, d head dim.
"""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_q3n.kernels.attention import qkv_norm_rope

_OTHER_CALLS = ("inference_context", "packed_seq_params", "key_value_states")


class GatedAttention(SelfAttention):
    """Softmax attention with QK-norm, partial RoPE and a sigmoid gate on the output of the heads."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as megatron-core's SelfAttention.

        Shapes: hidden [T / TP,B,H], or whole rows without sequence parallelism; RoPE angles [T,1,1,W], W rotated
            channels.
        """
        # packed documents, whose positions start anew, and inference have angles that are no table of one row
        is_plain_row = all(named.get(name) is None for name in _OTHER_CALLS)
        if self.config.plan.gated_attention.fused_qkv and is_plain_row and isinstance(rotary_pos_emb, Tensor):
            self.config.pass_state.rope_angles, rotary_pos_emb = rotary_pos_emb[:, 0, 0], None
        return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **named)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, ...]:
        """Project; apply RoPE to queries and keys if `forward` has set the angles.

        Returns: query [T,B,h,d], key and value [T,B,kv,d], and with `output_gate` the gate [T,B,kv,(h / kv)·d].
        """
        angles = self.config.pass_state.take_rope_angles()
        if angles is None:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        qkv_TBX, _ = self.linear_qkv(hidden_states)
        query, key, value, gate = qkv_norm_rope.qkv_norm_rope(
            qkv_TBX,
            angles,
            self.q_layernorm.weight,
            self.k_layernorm.weight,
            self.num_query_groups_per_partition,
            output_gate,
            self.config.layernorm_epsilon,
            fused=True,
        )
        return (query, key, value, gate) if output_gate else (query, key, value)
