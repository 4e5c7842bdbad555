"""Protocols of the model's parts: what callers may rely on, whichever class a layer spec puts into a slot.

megatron-core builds its layers from specs, so a slot holds one of several unrelated classes: a linear is
megatron-core's or TransformerEngine's, a token mixer is attention or Gated DeltaNet. Process groups, configurations and
layers that only one class provides are annotated with that class.

Shapes: T tokens, B rows, H hidden size.
"""

from typing import Any, Protocol

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class Norm(Protocol):
    """RMSNorm of a backend: ZeroCenteredRMSNorm or TENorm."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""


class Linear(Protocol):
    """Tensor-parallel linear of a backend: ColumnParallelLinear, RowParallelLinear or TransformerEngine's."""

    weight: Tensor

    def __call__(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the product and, if it is to be added later, the bias."""


class CoreAttention(Protocol):
    """Softmax attention between the projections: TorchCausalAttention or TEDotProductAttention."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        """Return the heads' outputs [T,B,h·d]."""


class TokenMixer(Protocol):
    """Mixer of a layer: Gated DeltaNet or gated attention; takes one alias of its input per consumer (sublayers.py)."""

    config: TransformerConfig

    def __call__(self, hidden_states: Tensor | tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Tensor | None]:
        """Mix tokens [T,B,H]. Returns: (output [T,B,H], bias or None)."""


class MoELayerLike(Protocol):
    """MoE layer of a sublayer: Qwen3NextMoELayer."""

    config: TransformerConfig

    def __call__(
        self, hidden_states: Tensor | tuple[Tensor, ...], *, padding_mask: Tensor | None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the experts on tokens [T,B,H]. Returns: (output [T,B,H], bias or None)."""


class LanguageModel(Protocol):
    """Whole model in one pipeline stage, as generation uses it: Qwen3NextModel.

    `mtp` exists where `mtp_process` is true.
    """

    config: TransformerConfig
    pg_collection: ProcessGroupCollection
    rotary_pos_emb: RotaryEmbedding
    embedding: Any
    decoder: Any
    output_layer: Linear
    mtp: Any
    mtp_process: bool
    training: bool

    def __call__(self, input_ids: Tensor, position_ids: Tensor, attention_mask: None, **options: Any) -> Tensor:
        """Return logits [B,T,V], or losses [B,T] where labels are passed."""


class MTPLayer(Protocol):
    """MTP layer in training: MultiTokenPredictionLayer, whose sublayers are those of a stack."""

    config: TransformerConfig
    training: bool
    mtp_model_layer: Any

    def _concat_embeddings(self, hidden_states: Tensor, decoder_input: Tensor, /) -> Tensor:
        """Normalize hidden states and embeddings, and project their concatenation."""

    def _postprocess(self, hidden_states: Tensor, /) -> Tensor:
        """Apply the final norm."""


class AttentionSublayer(Protocol):
    """Sublayer of gated attention, as draft chains run it."""

    config: TransformerConfig
    self_attention: Any
    input_layernorm: Norm
    self_attn_bda: Any
