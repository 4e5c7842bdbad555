"""Variants of gated attention for ablations: other gates than the published one, and sliding windows.

The published model uses model/attention/gated_attention.py instead (model/spec.py). The gates are those of Gated
Attention for LLMs (arXiv 2505.06708), sections 2.2 and 3.1; Y is the gated tensor, X the layer's normalized input, W
the gate's weight:

    Y' = Y · act(X W)     act sigmoid, or SiLU x · sigmoid(x)

| choice | |
|---|---|
| position | output: Y is the output of a head (G1 in the paper); value: Y are the values (G2) |
| granularity | elementwise: a gate for each channel of a head; headwise: one for the whole head |
| heads | a gate per head, or one gate for all of them (shared) |

If the gate is elementwise, on the output and per head, W is part of the rows of `linear_qkv`, as published. Every other
W is `linear_gate`, rows head by head, never in FP8, because it is small and sensitive. With tensor parallelism its rows
are sharded with the heads; a shared one is replicated on every rank, which computes it for its part of the sequence.

In generation, keys and values older than the window stay in the KV cache, but are masked.

Shapes: T tokens, B rows, h heads of this rank, d head dim, H hidden size.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_q3n.config import SLIDING_ATTENTION, ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


class VariantAttention(SelfAttention):
    """megatron-core's SelfAttention with any gate, and a sliding window if the layer has one.

    `config` is a copy for this layer. Generation, too, reads its output gate and its window from it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *,
        model: ModelConfig,
        name: str | None = None,
        **options: Any,
    ) -> None:
        config = copy(config)
        # MTP's layer numbers start at 1 again
        in_trunk = not (name or "").startswith("mtp")
        if in_trunk and model.mixers[(layer_number - 1) // 2] == SLIDING_ATTENTION:
            assert model.attention_window_tokens
            config.window_size = (model.attention_window_tokens - 1, 0)
        super().__init__(config, submodules, layer_number, name=name, **options)
        gates_something = model.attention_gate != "none"
        self.gates_values = gates_something and model.attention_gate_position == "value"
        config.attention_output_gate = gates_something and not self.gates_values
        self.activation = ACTIVATIONS[model.attention_gate_activation]
        self.gate_width = model.gate_width
        self.linear_gate: nn.Module | None = None
        if gates_something and not model.gate_is_in_query_projection:
            rows = model.gate_heads * model.gate_width
            kind = SharedGate if model.attention_gate_shared else _head_gates
            self.linear_gate = kind(config, rows, self.pg_collection.tp)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, ...]:
        """Project to query, key and value, and to the gate of the output; a gate of the values is applied to them.

        Returns: query [T,B,h,d], key and value, and with `output_gate` the gate [T,B,h or 1,d or 1].
        """
        assert split_qkv
        if self.linear_gate is None:
            return super().get_query_key_value_tensors(hidden_states, None, output_gate)
        query, key, value = super().get_query_key_value_tensors(hidden_states)
        gate, _ = self.linear_gate(hidden_states)
        gate = gate.unflatten(-1, (-1, self.gate_width))
        if not self.gates_values:
            return query, key, value, gate
        return query, key, self._apply_gate(value, gate)

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate the output of the heads. Shapes: x [T,B,h·d]; gate [T,B,h or 1,d or 1]."""
        heads = x.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return self._apply_gate(heads, gate).flatten(-2)

    def _apply_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return (x * self.activation(gate.float())).to(x.dtype)


def _head_gates(config: TransformerConfig, rows: int, tp_group: ProcessGroup) -> ColumnParallelLinear:
    """Return the projection to the gates of all heads, sharded over ranks with the heads."""
    return ColumnParallelLinear(
        config.hidden_size,
        rows,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp_group,
    )


class SharedGate(nn.Module):
    """Projection to the gate shared by all heads, replicated on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, rows: int, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        shape, device = (rows, config.hidden_size), torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        # Ranks compute it for different tokens: finalize_model_grads sums the gradients of parameters with this
        # attribute.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            assert config.init_method
            config.init_method(self.weight)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return the gate of every token [T,B,rows], and no bias.

        Backward, the gradients from the ranks' heads are reduce-scattered to the parts of the sequence.

        Shapes: hidden [T,B,H]; with sequence parallelism this rank's part of T.
        """
        gate = F.linear(hidden, self.weight)
        if self.config.sequence_parallel:
            gate = gather_from_sequence_parallel_region(gate, group=self.tp_group)
        return gate, None
