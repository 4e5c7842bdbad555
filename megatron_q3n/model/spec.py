"""The one file that names megatron-core's layer specs: which class fills which slot, per backend.

Two backends, one spec: the same parameter names, shapes and checkpoint keys. `torch` runs anywhere;
`transformer_engine` needs a GPU. What differs is only the class behind a name.

A HybridModel layer is half of what the paper calls a layer: G (Gated DeltaNet) or * (gated attention), then E (MoE).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_q3n.config import RunConfig
from megatron_q3n.model.attention.core import TorchCausalAttention
from megatron_q3n.model.attention.gated_attention import GatedAttention
from megatron_q3n.model.attention.variants import VariantAttention, needs_variant
from megatron_q3n.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_q3n.model.moe.experts import StackedExperts
from megatron_q3n.model.moe.router import GlobalBatchRouter
from megatron_q3n.model.moe.shared_expert import GatedSharedExpert
from megatron_q3n.model.moe.token_dispatcher import Qwen3NextMoELayer
from megatron_q3n.model.norms import ZeroCenteredRMSNorm
from megatron_q3n.model.sublayers import MixerSublayer, MoESublayer


@dataclass(frozen=True)
class Backend:
    """The classes that differ between backends."""

    norm: Any
    column_linear: Any
    row_linear: Any
    core_attention: Any


def backend_named(name: str) -> Backend:
    """Return the classes of "torch" or "transformer_engine"."""
    if name == "torch":
        return Backend(ZeroCenteredRMSNorm, ColumnParallelLinear, RowParallelLinear, TorchCausalAttention)
    assert name == "transformer_engine"
    from megatron.core.extensions.transformer_engine import (  # late: needs TransformerEngine
        TEColumnParallelLinear,
        TEDotProductAttention,
        TENorm,
        TERowParallelLinear,
    )

    return Backend(TENorm, TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention)


def stack_spec(config: RunConfig, backend: Backend) -> ModuleSpec:
    """Return the spec of the whole stack, MTP included.

    Also gives HybridStack our norm for `final_norm`, which it takes from its own module (hybrid_block.py:215).
    """
    hybrid_block.TENorm = backend.norm
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            gdn_layer=_mixer_layer(_gated_delta_net(config, backend), config, backend),
            attention_layer=_mixer_layer(_gated_attention(config, backend), config, backend),
            moe_layer=ModuleSpec(
                module=MoESublayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=_head_norm(config, backend),
                    mlp=_moe(config, backend),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            mtp_block_spec=_mtp(backend),
        ),
    )


def _mixer_layer(mixer: ModuleSpec, config: RunConfig, backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=MixerSublayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_head_norm(config, backend), self_attention=mixer, self_attn_bda=get_bias_dropout_add
        ),
    )


def _head_norm(config: RunConfig, backend: Backend) -> Any:
    """Return the norm that also hands on the stream; an fp32 stream is the backend's, which makes bf16 of it."""
    is_wide = config.model.megatron.get("fp32_residual_connection", False)
    return backend.norm if is_wide else ZeroCenteredRMSNorm


def _gated_delta_net(config: RunConfig, backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=GatedDeltaNet,
        params={
            "chunk_size": config.model.linear_chunk_size,
            "time_step_init": config.model.linear_time_step_init,
            "recompute": "gated_delta_net" in config.training.recompute_modules,
            "passes_state": config.parallel.linear_context_parallel == "state_passing",
        },
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.column_linear,
            beta_alpha_proj=ColumnParallelLinear,  # torch on both backends: out of FP8's reach
            out_proj=backend.row_linear,
        ),
    )


def _gated_attention(config: RunConfig, backend: Backend) -> ModuleSpec:
    variant = needs_variant(config.model)
    return ModuleSpec(
        module=VariantAttention if variant else GatedAttention,
        params={"attn_mask_type": AttnMaskType.causal, **({"model": config.model} if variant else {})},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_linear,
            core_attention=backend.core_attention,
            linear_proj=backend.row_linear,
            q_layernorm=backend.norm,
            k_layernorm=backend.norm,
        ),
    )


def _moe(config: RunConfig, backend: Backend) -> Any:
    rate = config.model.moe_router_bias_update_rate
    shared = MLPSubmodules(linear_fc1=backend.column_linear, linear_fc2=backend.row_linear)
    return partial(
        Qwen3NextMoELayer,
        submodules=MoESubmodules(
            router=partial(
                GlobalBatchRouter,
                normalized_init=config.model.moe_router_normalized_init,
                bias_update_rate=rate if config.model.moe_router_enable_expert_bias else None,
            ),
            experts=StackedExperts,
            shared_experts=partial(GatedSharedExpert, submodules=shared),
        ),
    )


def _mtp(backend: Backend) -> ModuleSpec:
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=backend.norm,
            hnorm=backend.norm,
            eh_proj=backend.column_linear,
            mtp_model_layer=None,  # built by HybridModel from the pattern behind "/"
            layer_norm=backend.norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )
