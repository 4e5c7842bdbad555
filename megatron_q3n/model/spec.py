"""Layer specs for megatron-core: the class in every slot, per backend.

Both backends have the same spec, parameter names, shapes and checkpoint keys, and differ in the classes only. `torch`
runs anywhere; `transformer_engine` needs a GPU.

A HybridModel layer is half of a layer of the paper: G (Gated DeltaNet) or * (gated attention), then E (MoE).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
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
from megatron_q3n.model.attention.variants import VariantAttention
from megatron_q3n.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_q3n.model.moe.experts import StackedExperts
from megatron_q3n.model.moe.layer import Qwen3NextMoELayer
from megatron_q3n.model.moe.router import GlobalBatchRouter
from megatron_q3n.model.moe.shared_expert import GatedSharedExpert
from megatron_q3n.model.norms import ZeroCenteredRMSNorm
from megatron_q3n.model.protocols import CoreAttention, Linear, MoELayerLike, Norm
from megatron_q3n.model.sublayers import MixerSublayer, MoESublayer


@dataclass(frozen=True)
class Backend:
    """Classes that differ between backends."""

    norm: type[Norm]
    column_linear: type[Linear]
    row_linear: type[Linear]
    core_attention: type[CoreAttention]


def backend_named(name: str) -> Backend:
    """Return the classes of "torch" or "transformer_engine"."""
    if name == "torch":
        return Backend(ZeroCenteredRMSNorm, ColumnParallelLinear, RowParallelLinear, TorchCausalAttention)
    assert name == "transformer_engine"
    # imported here because TransformerEngine need not be installed
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TENorm,
        TERowParallelLinear,
    )

    return Backend(TENorm, TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention)


def stack_spec(config: RunConfig, backend: Backend) -> ModuleSpec:
    """Return the spec of the whole stack, including MTP."""
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            gdn_layer=_mixer_layer("gated_delta_net", _gated_delta_net(config, backend), config, backend),
            attention_layer=_mixer_layer("gated_attention", _gated_attention(config, backend), config, backend),
            moe_layer=ModuleSpec(
                module=MoESublayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=_input_norm(config, backend),
                    mlp=_moe(config, backend),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            mtp_block_spec=_mtp(backend),
        ),
    )


def _mixer_layer(kind: str, mixer: ModuleSpec, config: RunConfig, backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=MixerSublayer,
        params={"kind": kind},
        submodules=TransformerLayerSubmodules(
            input_layernorm=_input_norm(config, backend), self_attention=mixer, self_attn_bda=get_bias_dropout_add
        ),
    )


def _input_norm(config: RunConfig, backend: Backend) -> type[Norm]:
    """Return the norm at the start of a sublayer, which also returns the residual.

    With an fp32 residual stream it is the backend's norm, which rounds to bf16.
    """
    is_fp32 = config.model.megatron.get("fp32_residual_connection", False)
    return backend.norm if is_fp32 else ZeroCenteredRMSNorm


def _gated_delta_net(config: RunConfig, backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=GatedDeltaNet,
        params={"chunk_size": config.model.linear_chunk_size, "time_step_init": config.model.linear_time_step_init},
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.column_linear,
            # torch on both backends: never in FP8
            beta_alpha_proj=ColumnParallelLinear,
            out_proj=backend.row_linear,
        ),
    )


def _gated_attention(config: RunConfig, backend: Backend) -> ModuleSpec:
    variant = config.model.uses_attention_variant
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


def _moe(config: RunConfig, backend: Backend) -> Callable[..., MoELayerLike]:
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
            # built by HybridModel from the pattern after "/"
            mtp_model_layer=None,
            layer_norm=backend.norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )
