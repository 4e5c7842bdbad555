"""Every dimension of the model, named as megatron-core names it, and the sizes that follow from them.

One *layer* here is what the paper calls a layer: a token mixer (Gated DeltaNet or gated attention) and its MoE.
megatron-core's HybridModel counts each half as a layer of its own; `megatron_num_layers` is that count.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.megatron_fields import check_pass_through
from megatron_q3n.config.section import Section

GATED_DELTA_NET = "G"
GATED_ATTENTION = "*"
MOE = "E"

Positive = Field(gt=0)


class ModelConfig(Section):
    """Dimensions and choices of a Qwen3-Next-like hybrid model."""

    name: str = Field("tiny", description="for people and run names; nothing depends on it")
    backend: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto", description="auto: TransformerEngine where a GPU and TE exist, else plain torch"
    )
    vocab_size: int = Field(512, gt=0, description="rows of embedding and head, padding included")
    hidden_size: int = Field(128, gt=0)
    num_layers: int = Field(4, gt=0, description="token mixers, each with its MoE")
    mixer_pattern: str = Field(
        "GGG*", description="repeated over the layers: G Gated DeltaNet, * gated attention"
    )
    max_position_embeddings: int = Field(32768, gt=0)
    init_method_std: float = Field(0.02, gt=0)
    embedding_init_method_std: float | None = Field(
        None,
        gt=0,
        description="null: init_method_std",
    )
    layernorm_epsilon: float = Field(1e-6, gt=0)
    # gated attention
    num_attention_heads: int = Field(4, gt=0)
    num_query_groups: int = Field(2, gt=0, description="key/value heads")
    kv_channels: int = Field(32, gt=0, description="head dimension")
    rotary_percent: float = Field(0.25, gt=0, le=1)
    rotary_base: float = Field(1e7, gt=0)
    attention_output_gate: bool = Field(
        True, description="sigmoid gate on the attention output (arXiv 2505.06708)"
    )
    # Gated DeltaNet
    linear_num_key_heads: int = Field(4, gt=0)
    linear_num_value_heads: int = Field(8, gt=0)
    linear_key_head_dim: int = Field(16, gt=0)
    linear_value_head_dim: int = Field(16, gt=0)
    linear_conv_kernel_dim: int = Field(4, gt=1)
    linear_chunk_size: int = Field(
        64, gt=0, description="tokens per chunk of the chunked delta rule"
    )
    # mixture of experts
    num_moe_experts: int = Field(8, gt=0)
    moe_router_topk: int = Field(2, gt=0)
    moe_ffn_hidden_size: int = Field(64, gt=0)
    moe_shared_expert_intermediate_size: int = Field(64, gt=0)
    moe_router_load_balancing_type: Literal[
        "global_aux_loss", "aux_loss", "seq_aux_loss", "none"
    ] = Field(
        "global_aux_loss",
        description="global_aux_loss balances over the global batch (arXiv 2501.11873)",
    )
    moe_aux_loss_coeff: float = Field(1e-3, ge=0)
    moe_z_loss_coeff: float = Field(0.0, ge=0)
    moe_router_normalized_init: bool = Field(
        True,
        description="give every router row the same norm at init, so that no expert starts favoured",
    )
    # multi-token prediction
    mtp_num_layers: int = Field(
        1, ge=0, description="prediction depths beyond the next token; 0 builds no MTP layer"
    )
    mtp_loss_scaling_factor: float = Field(0.1, ge=0)
    mtp_use_repeated_layer: bool = Field(False, description="one shared layer for all depths")
    megatron: dict[str, Any] = Field(
        default_factory=dict,
        description="any other megatron-core TransformerConfig field, checked by name",
    )

    @model_validator(mode="after")
    def _legal(self) -> "ModelConfig":
        bad = sorted(set(self.mixer_pattern) - {GATED_DELTA_NET, GATED_ATTENTION})
        if bad or not self.mixer_pattern:
            raise UserError(
                f"model.mixer_pattern={self.mixer_pattern!r}: use only G (Gated DeltaNet) and * (attention)."
            )
        _divides(
            "model.num_attention_heads",
            self.num_attention_heads,
            "model.num_query_groups",
            self.num_query_groups,
        )
        _divides(
            "model.linear_num_value_heads", self.linear_num_value_heads,
            "model.linear_num_key_heads", self.linear_num_key_heads,
        )  # fmt: skip
        _divides(
            "model.num_layers",
            self.num_layers,
            "the length of model.mixer_pattern",
            len(self.mixer_pattern),
        )
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            raise UserError(
                f"model.rotary_percent={self.rotary_percent} of model.kv_channels={self.kv_channels} gives a rotary "
                f"dimension of {self.rotary_dim}; it must be even and at least 2."
            )
        if self.moe_router_topk > self.num_moe_experts:
            raise UserError(
                f"model.moe_router_topk={self.moe_router_topk} is more than "
                f"model.num_moe_experts={self.num_moe_experts}; choose at most that many."
            )
        if self.mtp_use_repeated_layer and self.mtp_num_layers == 0:
            raise UserError(
                "model.mtp_use_repeated_layer=true has no effect with model.mtp_num_layers=0."
            )
        if self.moe_router_load_balancing_type == "none" and self.moe_aux_loss_coeff > 0:
            raise UserError(
                f"model.moe_aux_loss_coeff={self.moe_aux_loss_coeff} has no effect with "
                "model.moe_router_load_balancing_type=none; set it to 0."
            )
        check_pass_through(self.megatron)
        return self

    @property
    def rotary_dim(self) -> int:
        """Rotated part of an attention head."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def mixers(self) -> str:
        """One symbol per layer, e.g. "GGG*GGG*"."""
        return self.mixer_pattern * (self.num_layers // len(self.mixer_pattern))

    @property
    def main_pattern(self) -> str:
        """megatron-core's symbols without pipeline cuts, e.g. "GEGEGE*E"."""
        return "".join(mixer + MOE for mixer in self.mixers)

    @property
    def megatron_num_layers(self) -> int:
        """Number of megatron-core layers: each mixer and each MoE is one."""
        return 2 * self.num_layers

    @property
    def key_dim(self) -> int:
        """Width of all Gated DeltaNet keys (and of its queries)."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all Gated DeltaNet values (and of its output gate)."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution over q|k|v."""
        return 2 * self.key_dim + self.value_dim


def _divides(what: str, number: int, by: str, divisor: int) -> None:
    if number % divisor:
        raise UserError(f"{what}={number} is not divisible by {by}={divisor}; make it a multiple.")
