"""Sublayers around the residual stream: megatron-core's with a fused norm, for a token mixer (G or *) or MoE (E).

The norm at the start of a sublayer returns one alias of the normed tokens per consumer, and the residual. Backward,
the gradients of all of them accumulate in one pass of the fused RMSNorm backward (kernels/residual_norm.py). Where the
plan (config/execution_rules.py) does not have `aliased_norm`, and for inference, a sublayer runs megatron-core's code.
"""

from typing import Any, Literal

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_q3n.config.execution_plan import MoEPlan, SublayerPlan
from megatron_q3n.model.packed_params import packing_of
from megatron_q3n.model.protocols import MoELayerLike, TokenMixer

_NOT_FOR_MIXERS = ("context", "context_mask", "padding_mask")


class MixerSublayer(TransformerLayer):
    """G or * sublayer: hidden + mixer(norm(hidden)). `kind` is the plan's field of the mixer."""

    def __init__(self, *args: Any, kind: Literal["gated_delta_net", "gated_attention"], **options: Any) -> None:
        super().__init__(*args, **options)
        self.kind = kind

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """Return hidden states and, as megatron-core does, a context, which is None."""
        plan: SublayerPlan = getattr(self.config.plan, self.kind).sublayer
        decodes = named.get("inference_context") is not None
        if args or decodes or not plan.aliased_norm:
            return super()._forward_attention(hidden_states, *args, **named)
        mixer: TokenMixer = self.self_attention
        options = {name: value for name, value in named.items() if name not in _NOT_FOR_MIXERS}
        residual, *normed = self.input_layernorm(hidden_states, num_consumers=plan.num_norm_consumers)
        mixed = mixer(normed[0] if len(normed) == 1 else tuple(normed), **options)
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add(mixed, residual, self.hidden_dropout), None


class MoESublayer(MoETransformerLayer):
    """E sublayer: hidden + moe(norm(hidden)). `is_mtp_layer` is derived from the name.

    HybridStack 0.19.2 passes `is_mtp_layer` to the attention slot but not to this one
    (megatron/core/models/hybrid/hybrid_block.py:182-192).
    """

    def __init__(self, *args: Any, name: str | None = None, is_mtp_layer: bool = False, **options: Any) -> None:
        is_inside_mtp = is_mtp_layer or (name or "").startswith("mtp")
        super().__init__(*args, name=name, is_mtp_layer=is_inside_mtp, **options)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        """Return hidden states."""
        plan: MoEPlan = self.config.plan.moe
        moe: MoELayerLike = self.mlp
        decodes = bool(args) and args[0] is not None
        if self.training and not decodes:
            named["padding_mask"] = self._padding_mask(named.get("packed_seq_params"))
        if decodes or not plan.sublayer.aliased_norm:
            return super()._forward_mlp(hidden_states, *args, **named)
        residual, *normed = self.pre_mlp_layernorm(hidden_states, num_consumers=plan.sublayer.num_norm_consumers)
        mask = named.get("padding_mask")
        if not plan.fused_residual:
            return self._forward_post_mlp(moe(tuple(normed), padding_mask=mask), residual)
        output, _ = moe(tuple(normed), padding_mask=mask, residual=residual)
        # activation checkpointing does not accept views
        return make_viewless_tensor(output, output.requires_grad, keep_graph=True)

    def _padding_mask(self, packed: PackedSeqParams | None) -> Tensor | None:
        """Return which of this rank's tokens are padding, bool [1,S]; None without padding.

        HybridModel's own `padding_mask` is neither scattered for sequence parallelism nor passed to MTP layers
        (megatron/core/models/hybrid/hybrid_model.py:521-549).
        """
        packing = packing_of(packed)
        if packing is None:
            return None
        mask_S = packing.padding_mask(self.pg_collection.cp.size(), self.pg_collection.cp.rank())
        if mask_S is not None and self.config.sequence_parallel:
            mask_S = mask_S.chunk(self.pg_collection.tp.size())[self.pg_collection.tp.rank()]
        return None if mask_S is None else mask_S[None]
