"""Settings of training: precision, optimizer, schedule, batch and steps, validation, checkpoints."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.paths import InputPath
from megatron_q3n.config.section import MAX_SEED, Section

# of steps, sequences and tokens: far beyond any run, and products of three fit 64 bits
MAX_COUNT = 10**9

RECOMPUTE_MODULES = ("core_attn", "moe", "moe_act", "shared_experts", "layernorm", "gated_delta_net")


class PrecisionConfig(Section):
    """Dtypes of the large matrix products; gates, router, norm statistics and losses are always fp32."""

    compute: Literal["fp32", "bf16"] = "fp32"
    fp8: Literal["e4m3", "hybrid"] | None = Field(None, description="FP8 through TransformerEngine; needs a GPU")
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    grad_reduce_in_fp32: bool = True

    @model_validator(mode="after")
    def _legal(self) -> "PrecisionConfig":
        if self.fp8 and self.compute != "bf16":
            raise UserError(f"precision.fp8={self.fp8} needs precision.compute=bf16, found {self.compute}.")
        return self


class OptimizerConfig(Section):
    """AdamW, through megatron-core (fused where TransformerEngine or apex exist)."""

    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0, description="global gradient norm; 0 turns clipping off")
    decay_norm_weights: bool = Field(True, description="weight decay on every zero-centered norm weight")


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then decay to `min_lr` by `style`."""

    style: Literal["cosine", "wsd", "constant"] = "cosine"
    lr: float = Field(2e-3, gt=0, le=1e6, description="the peak")
    min_lr: float = Field(2e-4, ge=0)
    warmup_steps: int = Field(20, ge=0)
    decay_steps: int | float | None = Field(
        None,
        gt=0,
        description="cosine: steps until min_lr (null: training.steps); wsd: length of the final decay; "
        "below 1: this fraction of training.steps",
    )
    wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"

    @model_validator(mode="after")
    def _legal(self) -> "ScheduleConfig":
        if self.min_lr > self.lr:
            raise UserError(f"schedule.min_lr={self.min_lr} is above schedule.lr={self.lr}; lower it.")
        if isinstance(self.decay_steps, float) and self.decay_steps >= 1:
            raise UserError(
                f"schedule.decay_steps={self.decay_steps} is neither a number of steps nor a fraction below 1."
            )
        if self.style == "wsd" and self.decay_steps is None:
            raise UserError("schedule.style=wsd needs schedule.decay_steps, the length of the final decay in steps.")
        if self.style == "constant" and self.decay_steps is not None:
            raise UserError("schedule.decay_steps has no effect with schedule.style=constant; set it to null.")
        return self

    def decay(self, steps: int) -> int | None:
        """Return `decay_steps` as a number of steps, for a run of `steps` steps."""
        length = self.decay_steps
        return max(1, round(length * steps)) if isinstance(length, float) else length


class TrainingConfig(Section):
    """Number of steps, batch, and activation checkpointing (recompute)."""

    steps: int = Field(1000, gt=0, le=MAX_COUNT, description="optimizer steps of the whole run")
    sequence_length: int = Field(256, gt=1, le=MAX_COUNT, description="tokens")
    micro_batch_size: int = Field(
        4, gt=0, le=MAX_COUNT, description="sequences per forward pass and data parallel rank"
    )
    global_batch_size: int = Field(4, gt=0, le=MAX_COUNT, description="sequences per optimizer step over all ranks")
    seed: int = Field(1234, ge=0, le=MAX_SEED)
    deterministic: bool = Field(False, description="refuse kernels that are not deterministic (CPU kernels always are)")
    threads: int | None = Field(None, gt=0, description="CPU threads per process; null: 1, usually fastest")
    cuda_graph: bool | None = Field(
        None, description="replay a step's forward and backward passes as one CUDA graph; null: if possible"
    )
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_modules: list[
        Literal["core_attn", "moe", "moe_act", "shared_experts", "layernorm", "gated_delta_net"]
    ] = Field(
        default_factory=list,
        description="activation checkpointing: parts whose activations selective recompute drops and recomputes",
    )
    recompute_method: Literal["uniform", "block"] | None = Field(None, description="full recompute only")
    recompute_num_layers: int | None = Field(None, gt=0, description="full recompute only, in megatron-core sublayers")

    @model_validator(mode="after")
    def _legal(self) -> "TrainingConfig":
        if self.recompute_granularity == "selective" and not self.recompute_modules:
            raise UserError(
                "training.recompute_granularity=selective needs training.recompute_modules, any of: "
                + ", ".join(RECOMPUTE_MODULES)
            )
        if self.recompute_granularity != "selective" and self.recompute_modules:
            raise UserError("training.recompute_modules has an effect only with recompute_granularity=selective.")
        full = self.recompute_granularity == "full"
        if full and (self.recompute_method is None or self.recompute_num_layers is None):
            raise UserError(
                "training.recompute_granularity=full needs training.recompute_method (uniform or block) and "
                "training.recompute_num_layers."
            )
        if not full and (self.recompute_method or self.recompute_num_layers):
            raise UserError("training.recompute_method and recompute_num_layers need recompute_granularity=full.")
        return self


class ValidationConfig(Section):
    """Held-out loss during training."""

    interval_steps: int = Field(100, ge=0, description="0 validates only at the end")
    batches: int = Field(8, gt=0, description="global batches per validation, the same ones each time")
    bigram_baseline: bool = Field(
        False, description="at the end, fit a Witten-Bell bigram on the tokens trained on and report it as baseline"
    )


class CheckpointConfig(Section):
    """When checkpoints are saved, which are kept, and which one the run starts from."""

    interval_steps: int = Field(200, ge=0, description="0 saves only at the end and when stopped")
    keep_last: int = Field(2, gt=0, description="older checkpoints are deleted once a newer one is complete")
    keep_every_steps: int = Field(0, ge=0, description="multiples of this are never deleted; 0: none")
    asynchronous: bool = Field(
        True, description="write in the background, from a copy of the state in host memory; false: wait for the disk"
    )
    verify: Literal["full", "sizes"] = Field(
        "full", description="check before a checkpoint is loaded or counted as kept: every byte, or file sizes only"
    )
    time_limit_minutes: float | None = Field(None, gt=0, description="save and exit 75 after this long")
    load: InputPath | None = Field(
        None, description="start from the weights of this checkpoint or run directory (a new run, step 0)"
    )
    load_other_tokenizer: bool = Field(
        False, description="with load: pretraining on text of another tokenizer than the checkpoint's is allowed"
    )
    load_optimizer: bool = Field(False, description="with load: also the optimizer's moments")
