"""The published attention: megatron-core's SelfAttention, with what stands before the attention in one kernel.

Where the kernel serves (kernels/attention/qkv_norm_rope.py: a GPU in bf16, whole rows), the projection is split, its heads
normed and turned in one pass, and megatron-core is given no positions to turn them by. Elsewhere (packed documents,
whose positions start anew; more ranks than key heads; no GPU) everything is megatron-core's.
"""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_q3n.kernels.attention import qkv_norm_rope


class GatedAttention(SelfAttention):
    """softmax attention with RMS-normed heads, partial rotary positions and a sigmoid gate on what heads read."""

    _angles: Tensor | None = None  # between `forward` and the projection it calls

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Any = None, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; as megatron-core's.

        Shapes: hidden [T / TP,B,H], or whole rows without sequence parallelism; rotary positions [T,1,1,D'].
        """
        if self._fuses(hidden_states, rotary_pos_emb, named):
            self._angles, rotary_pos_emb = rotary_pos_emb[:, 0, 0], None
        return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **named)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Project; where `forward` said by which angles, queries and keys leave turned.

        Returns: query [T,B,h,d], key and value [T,B,kv,d], and with `output_gate` the gate [T,B,kv,(h / kv)·d].
        """
        angles, self._angles = self._angles, None
        if angles is None:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        qkv_TBX, _ = self.linear_qkv(hidden_states)
        query, key, value, gate = qkv_norm_rope.attention_inputs(
            qkv_TBX,
            angles,
            self.q_layernorm.weight,
            self.k_layernorm.weight,
            self.num_query_groups_per_partition,
            output_gate,
            self.config.layernorm_epsilon,
        )
        return (query, key, value, gate) if output_gate else (query, key, value)

    def _fuses(self, hidden: Tensor, rotary: Any, named: dict[str, Any]) -> bool:
        """Whether the kernel serves, and computes what this configuration asks for."""
        config = self.config
        if not isinstance(rotary, Tensor) or rotary.shape[1:3] != (1, 1):
            return False
        asked = ("inference_context", "packed_seq_params", "key_value_states")
        if any(named.get(name) is not None for name in asked):
            return False
        plain = config.qk_layernorm and config.normalization == "RMSNorm"
        plain &= config.layernorm_zero_centered_gamma and not config.rotary_interleaved
        plain &= not config.no_rope_freq and not config.test_mode
        plain &= self._yarn_concentration_factor == 1.0
        whole = config.num_query_groups >= self.world_size
        return plain and whole and qkv_norm_rope.serves(hidden, self.hidden_size_per_attention_head)
