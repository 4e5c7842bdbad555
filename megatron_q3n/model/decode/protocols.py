"""Protocols of the modules that decoding runs, in addition to model/protocols.py.

megatron-core builds its layers from specs, so the classes in its slots are unrelated; these protocols name the
attributes that model/decode/ and inference/ use.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_q3n.model.moe.experts import StackedExperts
from megatron_q3n.model.moe.router import GlobalBatchRouter
from megatron_q3n.model.moe.shared_expert import GatedSharedExpert
from megatron_q3n.model.protocols import LanguageModel, Linear, Norm


class DecodeModel(LanguageModel, Protocol):
    """Whole model on this rank, without pipeline parallelism: a HybridModel."""

    vocab_size: int
    max_sequence_length: int

    def modules(self) -> Iterator[nn.Module]:
        """Return all submodules."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all parameters."""

    def eval(self) -> object:
        """Set evaluation mode."""

    def train(self, mode: bool = True) -> object:
        """Set training or evaluation mode."""


class Sublayer(Protocol):
    """Entry of the layer pattern: a token mixer or an MoE layer, with its norm and residual connection."""

    config: TransformerConfig
    self_attention: Any
    input_layernorm: Norm
    mlp: "MoELayer"
    pre_mlp_layernorm: Norm

    def __call__(self, *, hidden_states: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the sublayer on hidden [T,N,X]."""


class AttentionMixer(Protocol):
    """Gated attention between its norm and its residual connection (model/attention/)."""

    config: TransformerConfig
    pg_collection: ProcessGroupCollection
    linear_qkv: Linear
    linear_proj: Linear
    q_layernorm: Norm | None
    k_layernorm: Norm | None
    num_query_groups_per_partition: int
    num_attention_heads_per_partition: int
    hidden_size_per_attention_head: int

    def get_query_key_value_tensors(self, hidden_states: Tensor, /, *, output_gate: bool) -> tuple[Tensor, ...]:
        """Project to query, key and value heads, and with `output_gate` to the gate."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor, /) -> Tensor:
        """Multiply the heads' outputs with the gate."""


class MoELayer(Protocol):
    """Mixture-of-experts layer (model/moe/)."""

    config: TransformerConfig
    router: GlobalBatchRouter
    experts: StackedExperts
    shared_experts: GatedSharedExpert | None
    tp_group: ProcessGroup


class MTPLayer(Protocol):
    """Multi-token prediction layer: projection of hidden state and embedding, sublayers, final norm."""

    config: TransformerConfig
    eh_proj: Linear
    enorm: Norm
    hnorm: Norm
    tp_group: ProcessGroup

    def _concat_embeddings(self, hidden_states: Tensor, decoder_input: Tensor, /) -> Tensor:
        """Norm and project hidden states and embeddings with megatron-core's modules."""
