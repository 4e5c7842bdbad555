"""Gated attention as ablations want it: other gates than the published one, and sliding windows.

The published model needs none of this and uses model/attention/gated_attention.py (spec.py). The
gates are those of Gated Attention for LLMs (arXiv 2505.06708), sections 2.2 and 3.1; Y is what is
gated, X the layer's normalised input, W the gate's weight:

    Y' = Y · act(X W)     act sigmoid, or SiLU x · sigmoid(x)

| choice | |
|---|---|
| position | output: Y is what a head has read (G1 there); value: Y are the values before they are read (G2) |
| granularity | elementwise: a gate for each channel of a head; headwise: one for the whole head |
| heads | each its own, or one gate for all of them (shared) |

Where the gate is elementwise, on the output and each head's own, W lies among the rows of
`linear_qkv`, as published. Every other W is `linear_gate`, rows head by head, out of FP8's reach, for it
is small and decides what passes. Under tensor parallelism its rows are cut with the heads; a shared
one is whole on every rank, each computing it for its share of the sequence.

Keys and values older than a window stay in the cache of generation, unread.

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

from megatron_q3n.config import SLIDING_ATTENTION, ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


def needs_variant(model: ModelConfig) -> bool:
    """Say whether megatron-core's SelfAttention cannot be this model's attention as it is."""
    published = model.attention_gate == "none" or (
        model.gate_lies_with_queries and model.attention_gate_activation == "sigmoid"
    )
    return not published or SLIDING_ATTENTION in model.mixer_pattern


class VariantAttention(SelfAttention):
    """megatron-core's SelfAttention with any gate, and a window where the layer has one.

    `config` becomes the layer's own: generation, too, reads from it whether this layer gates its output and
    how far it sees.
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
        in_trunk = not (name or "").startswith("mtp")  # MTP counts its layers from 1 again
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
        if gates_something and not model.gate_lies_with_queries:
            rows = model.gate_heads * model.gate_width
            kind = SharedGate if model.attention_gate_shared else _head_gates
            self.linear_gate = kind(config, rows, self.pg_collection.tp)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Project, with the gate too where it is for the output; values leave gated where it is for them.

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
        return query, key, self._open(value, gate)

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate what the heads have read. Shapes: x [T,B,h·d]; gate [T,B,h or 1,d or 1]."""
        heads = x.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return self._open(heads, gate).flatten(-2)

    def _open(self, x: Tensor, gate: Tensor) -> Tensor:
        return (x * self.activation(gate.float())).to(x.dtype)


def _head_gates(config: TransformerConfig, rows: int, tp_group: Any) -> ColumnParallelLinear:
    """Return the gates of all heads, cut over ranks as the heads are."""
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
    """The gate that all heads share, whole on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, rows: int, tp_group: Any) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        shape, device = (rows, config.hidden_size), torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        # every rank sees other tokens: finalize_model_grads sums what carries this mark
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            assert config.init_method
            config.init_method(self.weight)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return the gate of every token [T,B,rows], and no bias.

        Shapes: hidden [T,B,H]; with sequence parallelism this rank's share of T. Backward, the ranks' gradients, of
            their own heads, are summed on the way back to the shares.
        """
        gate = F.linear(hidden, self.weight)
        if self.config.sequence_parallel:
            gate = gather_from_sequence_parallel_region(gate, group=self.tp_group)
        return gate, None
