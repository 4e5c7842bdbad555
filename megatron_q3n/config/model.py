"""Settings of the model: dimensions with megatron-core's names, and sizes derived from them.

One *layer* is a layer of the paper: a token mixer (Gated DeltaNet or gated attention) and its MoE. megatron-core's
HybridModel counts each of the two as a layer; `megatron_num_layers` is that count.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.megatron_fields import check_pass_through
from megatron_q3n.config.section import Section

GATED_DELTA_NET = "G"
GATED_ATTENTION = "*"
SLIDING_ATTENTION = "S"
MOE = "E"

Positive = Field(gt=0)


class ModelConfig(Section):
    """Dimensions and variants of a Qwen3-Next-like hybrid model."""

    name: str = Field("tiny", description="label in logs and run names; no effect on the model")
    backend: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto", description="auto: TransformerEngine if a GPU and TE are available, else plain torch"
    )
    vocab_size: int = Field(
        512, gt=0, description="rows of embedding and head, padding included; unless set, enough for the tokenizer"
    )
    hidden_size: int = Field(128, gt=0)
    num_layers: int = Field(4, gt=0, description="token mixers, each with its MoE")
    mixer_pattern: str = Field(
        "GGG*",
        description="repeated over the layers: G Gated DeltaNet, * gated attention, S gated attention to a sliding "
        "window; MTP is always *",
    )
    max_position_embeddings: int = Field(32768, gt=0)
    init_method_std: float = Field(0.02, gt=0)
    embedding_init_method_std: float | None = Field(None, gt=0, description="null: init_method_std")
    layernorm_epsilon: float = Field(1e-6, gt=0)
    # gated attention
    num_attention_heads: int = Field(4, gt=0)
    num_query_groups: int = Field(2, gt=0, description="key/value heads")
    kv_channels: int = Field(32, gt=0, description="head dimension")
    rotary_percent: float = Field(0.25, gt=0, le=1)
    rotary_base: float = Field(1e7, gt=0)
    attention_gate: Literal["elementwise", "headwise", "none"] = Field(
        "elementwise", description="gate of gated attention (arXiv 2505.06708): one value per channel, or one per head"
    )
    attention_gate_position: Literal["output", "value"] = Field(
        "output", description="gated tensor: the attention output of each head, or its values"
    )
    attention_gate_activation: Literal["sigmoid", "silu"] = "sigmoid"
    attention_gate_shared: bool = Field(False, description="one gate for all heads, instead of one per head")
    attention_window_tokens: int | None = Field(
        None, gt=0, description="window of the S layers of model.mixer_pattern, in tokens, the query's token included"
    )
    # Gated DeltaNet
    linear_num_key_heads: int = Field(4, gt=0)
    linear_num_value_heads: int = Field(8, gt=0)
    linear_key_head_dim: int = Field(16, gt=0)
    linear_value_head_dim: int = Field(16, gt=0)
    linear_conv_kernel_dim: int = Field(4, gt=1)
    linear_chunk_size: int = Field(64, gt=0, description="tokens per chunk of the chunked delta rule")
    linear_time_step_init: tuple[float, float] | None = Field(
        None,
        description="time steps softplus(dt_bias) of the heads at init, log-uniform between these two: [0.001,0.1] as "
        "Mamba-2 (arXiv 2405.21060), half-lives of about 1 to 100 tokens; null: dt_bias is 1, as in the released "
        "model's code, half-lives below one token for nearly every head",
    )
    # mixture of experts
    num_moe_experts: int = Field(8, gt=0)
    moe_router_topk: int = Field(2, gt=0)
    moe_ffn_hidden_size: int = Field(64, gt=0)
    moe_shared_expert_intermediate_size: int = Field(64, gt=0)
    moe_router_load_balancing_type: Literal["global_aux_loss", "aux_loss", "seq_aux_loss", "none"] = Field(
        "global_aux_loss", description="global_aux_loss balances over the global batch (arXiv 2501.11873)"
    )
    moe_aux_loss_coeff: float = Field(1e-3, ge=0)
    moe_z_loss_coeff: float = Field(0.0, ge=0)
    moe_router_normalized_init: bool = Field(
        True, description="equal norm of all router rows at init, so that no expert is preferred at the start"
    )
    moe_router_enable_expert_bias: bool = Field(
        False,
        description="loss-free balancing: a bias per expert, for the top-k selection only, which rises while the "
        "expert gets less than its share of the global batch (arXiv 2408.15664)",
    )
    moe_router_bias_update_rate: float = Field(
        1e-3, ge=0, description="change of each bias per step, in units of the router's logits; 0 freezes them"
    )
    # multi-token prediction
    mtp_num_layers: int = Field(1, ge=0, description="prediction depths beyond the next token; 0 builds no MTP layer")
    mtp_loss_scaling_factor: float = Field(0.1, ge=0)
    mtp_use_repeated_layer: bool = Field(False, description="one layer shared by all depths")
    megatron: dict[str, Any] = Field(
        default_factory=dict, description="any other megatron-core TransformerConfig field, checked by name"
    )

    @model_validator(mode="after")
    def _legal(self) -> "ModelConfig":
        self._check_mixers()
        self._check_gate()
        self._check_time_steps()
        _divides("model.num_attention_heads", self.num_attention_heads, "model.num_query_groups", self.num_query_groups)
        _divides(
            "model.linear_num_value_heads",
            self.linear_num_value_heads,
            "model.linear_num_key_heads",
            self.linear_num_key_heads,
        )
        _divides("model.num_layers", self.num_layers, "the length of model.mixer_pattern", len(self.mixer_pattern))
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
            raise UserError("model.mtp_use_repeated_layer=true has no effect with model.mtp_num_layers=0.")
        if self.moe_router_load_balancing_type == "none" and self.moe_aux_loss_coeff > 0:
            raise UserError(
                f"model.moe_aux_loss_coeff={self.moe_aux_loss_coeff} has no effect with "
                "model.moe_router_load_balancing_type=none; set it to 0."
            )
        self._check_expert_bias()
        check_pass_through(self.megatron)
        return self

    def _check_mixers(self) -> None:
        bad = set(self.mixer_pattern) - {GATED_DELTA_NET, GATED_ATTENTION, SLIDING_ATTENTION}
        if bad or not self.mixer_pattern:
            raise UserError(
                f"model.mixer_pattern={self.mixer_pattern!r}: use only G (Gated DeltaNet), * (attention) and S "
                "(sliding-window attention)."
            )
        has_window, window = SLIDING_ATTENTION in self.mixer_pattern, self.attention_window_tokens
        if has_window and window is None:
            raise UserError(
                f"model.mixer_pattern={self.mixer_pattern!r} has sliding-window attention (S): set its window "
                "with model.attention_window_tokens."
            )
        if window is not None and not has_window:
            raise UserError(
                f"model.attention_window_tokens={window} has no effect with model.mixer_pattern="
                f"{self.mixer_pattern!r}: only its S layers have a window; set it to null, or use S."
            )

    def _check_time_steps(self) -> None:
        if self.linear_time_step_init is None:
            return
        shortest, longest = self.linear_time_step_init
        if not 0 < shortest <= longest:
            raise UserError(
                f"model.linear_time_step_init=[{shortest},{longest}]: give two time steps above 0, the smaller one "
                "first, e.g. [0.001,0.1]; null leaves dt_bias at 1."
            )

    def _check_gate(self) -> None:
        gate_settings = ("attention_gate_position", "attention_gate_activation", "attention_gate_shared")
        fields = type(self).model_fields
        if self.attention_gate == "none":
            for name in gate_settings:
                if (value := getattr(self, name)) != (default := fields[name].default):
                    raise UserError(
                        f"model.{name}={value} has no effect with model.attention_gate=none; set it to {default}."
                    )

    def _check_expert_bias(self) -> None:
        rate = type(self).model_fields["moe_router_bias_update_rate"].default
        if not self.moe_router_enable_expert_bias:
            if self.moe_router_bias_update_rate != rate:
                raise UserError(
                    f"model.moe_router_bias_update_rate={self.moe_router_bias_update_rate} has no effect without "
                    f"model.moe_router_enable_expert_bias=true; set it to {rate}."
                )
            return
        required = {
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": False,
            "moe_enable_routing_replay": False,
        }
        for name, allowed in required.items():
            if (found := self.megatron.get(name, allowed)) != allowed:
                raise UserError(
                    f"model.moe_router_enable_expert_bias=true adds the bias to the logits: "
                    f"model.megatron.{name} must be {allowed}, found {found}."
                )

    @property
    def rotary_dim(self) -> int:
        """Channels of an attention head that RoPE rotates."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def mixers(self) -> str:
        """One symbol per layer, e.g. "GGG*GGG*"."""
        return self.mixer_pattern * (self.num_layers // len(self.mixer_pattern))

    @property
    def uses_attention_variant(self) -> bool:
        """Whether attention differs from the published layer: another gate, or a sliding window in some layer."""
        published = self.attention_gate == "none" or (
            self.gate_is_in_query_projection and self.attention_gate_activation == "sigmoid"
        )
        return not published or SLIDING_ATTENTION in self.mixer_pattern

    @property
    def gate_is_in_query_projection(self) -> bool:
        """Whether the gates are part of the query projection, as in the released model, or a separate projection."""
        elementwise = self.attention_gate == "elementwise"
        return elementwise and self.attention_gate_position == "output" and not self.attention_gate_shared

    @property
    def gate_heads(self) -> int:
        """Number of gates: 1 if shared, else one per query head (output) or per key/value head (value)."""
        if self.attention_gate == "none":
            return 0
        values = self.attention_gate_position == "value"
        heads = self.num_query_groups if values else self.num_attention_heads
        return 1 if self.attention_gate_shared else heads

    @property
    def gate_width(self) -> int:
        """Channels of the gate of one head."""
        return self.kv_channels if self.attention_gate == "elementwise" else 1

    @property
    def main_pattern(self) -> str:
        """One symbol per megatron-core layer, without pipeline cuts, e.g. "GEGEGE*E"."""
        return "".join(mixer + MOE for mixer in self.mixers)

    @property
    def megatron_num_layers(self) -> int:
        """Number of megatron-core layers: each mixer and each MoE is one."""
        return 2 * self.num_layers

    @property
    def key_dim(self) -> int:
        """Channels of all Gated DeltaNet keys (and of its queries)."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Channels of all Gated DeltaNet values (and of its output gate)."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution over q|k|v."""
        return 2 * self.key_dim + self.value_dim


def _divides(what: str, number: int, by: str, divisor: int) -> None:
    if number % divisor:
        raise UserError(f"{what}={number} is not divisible by {by}={divisor}; make it a multiple.")
