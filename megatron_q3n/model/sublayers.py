"""megatron-core's two sublayers as this model uses them: a mixer (G or *) or experts (E) around the residual stream.

What they add: the norm at a sublayer's head gives each reader a name of its own for the normed tokens, and the
stream one, so that backward their gradients are added in one pass (kernels/residual_norm.py). Where something
stands against it (recomputation of a part, an fp32 stream, dropout, inference) a sublayer is megatron-core's.

Whether gradients are wanted does not matter: the two ways round differently, and a full recomputation, a validation or
a score in reinforcement learning must see the tokens, and choose the experts, that training does.
"""

from typing import Any

from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_q3n.model.norms import ZeroCenteredRMSNorm

_NOT_FOR_MIXERS = ("context", "context_mask", "padding_mask")


class MixerSublayer(TransformerLayer):
    """The G and * slots: hidden + mixer(norm(hidden))."""

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """Return hidden states and no context, as megatron-core's does."""
        norm = self.input_layernorm
        decodes = named.get("inference_context") is not None
        if args or self.recompute_input_layernorm or decodes or not _is_plain(self, norm):
            return super()._forward_attention(hidden_states, *args, **named)
        named = {name: given for name, given in named.items() if name not in _NOT_FOR_MIXERS}
        readers = getattr(self.self_attention, "readers", 1)
        stream, *normed = norm(hidden_states, readers=readers)
        mixed = self.self_attention(normed[0] if readers == 1 else tuple(normed), **named)
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add(mixed, stream, self.hidden_dropout), None


class MoESublayer(MoETransformerLayer):
    """The E slot: hidden + experts(norm(hidden)); told whether it is inside MTP.

    HybridStack 0.19.2 tells the attention slot but not this one (hybrid_block.py:182-192); its name says it.
    """

    def __init__(self, *args: Any, name: str | None = None, is_mtp_layer: bool = False, **options: Any) -> None:
        inside_mtp = is_mtp_layer or (name or "").startswith("mtp")
        super().__init__(*args, name=name, is_mtp_layer=inside_mtp, **options)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """Return hidden states."""
        norm, experts = self.pre_mlp_layernorm, self.mlp
        readers = getattr(experts, "readers", 1)
        decodes = bool(args) and args[0] is not None
        whole = not self.recompute_pre_mlp_layernorm and not self.recompute_mlp
        if readers == 1 or decodes or not whole or not _is_plain(self, norm):
            return super()._forward_mlp(hidden_states, *args, **named)
        stream, *normed = norm(hidden_states, readers=readers)
        mask = named.get("padding_mask")
        if not experts.adds_stream(stream):
            return self._forward_post_mlp(experts(tuple(normed), padding_mask=mask), stream)
        output, _ = experts(tuple(normed), padding_mask=mask, stream=stream)
        # checkpointing refuses views
        return make_viewless_tensor(output, output.requires_grad, keep_graph=True)


def _is_plain(layer: TransformerLayer, norm: Any) -> bool:
    """Whether nothing of megatron-core's that a sublayer here leaves out is asked for."""
    config = layer.config
    asked = config.fp32_residual_connection or config.fine_grained_activation_offloading
    asked = asked or config.mlp_chunks_for_training > 1 or config.cuda_graph_impl != "none"
    return isinstance(norm, ZeroCenteredRMSNorm) and not asked and config.hidden_dropout == 0
