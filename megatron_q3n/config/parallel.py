"""Settings of the parallel layout, and the checks of a layout against model, sequence length and world size."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.model import SLIDING_ATTENTION, ModelConfig
from megatron_q3n.config.section import Section


class ParallelConfig(Section):
    """Sizes of the parallel groups. The data-parallel size is the world size divided by the others."""

    world_size: int | None = Field(
        None, gt=0, description="number of processes of a dry run; otherwise WORLD_SIZE or 1"
    )
    tensor_model_parallel_size: int = Field(1, gt=0)
    sequence_parallel: bool | None = Field(None, description="null: on with tensor parallelism (MoE training needs it)")
    pipeline_model_parallel_size: int = Field(1, gt=0)
    virtual_pipeline_model_parallel_size: int | None = Field(None, gt=1, description="model chunks per pipeline rank")
    context_parallel_size: int = Field(1, gt=0)
    linear_context_parallel: Literal["all_to_all", "state_passing"] = Field(
        "all_to_all",
        description="context parallelism of Gated DeltaNet: all_to_all exchanges sequence for heads (TP × CP must "
        "divide the key heads); state_passing sends recurrent states along the sequence (any CP)",
    )
    expert_model_parallel_size: int = Field(1, gt=0)
    expert_tensor_parallel_size: int = Field(1, gt=0)
    moe_token_dispatcher_type: Literal["auto", "alltoall", "allgather", "flex"] = Field(
        "auto",
        description="auto: without host synchronization (one process, or an expert-parallel group inside a node), else "
        "megatron-core's alltoall; the others are megatron-core's",
    )
    expert_capacity_headroom: float = Field(
        1.1,
        ge=1,
        description="rows of a captured step's static buffers per rank over the most rows seen so far; a step that "
        "needs more is repeated without the graph, and the buffers grow",
    )
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    gpus_per_node: int = Field(
        8,
        gt=0,
        description="GPUs that share memory over NVLink: placement advice of the dry run, and which expert-parallel "
        "groups use symmetric memory",
    )

    @model_validator(mode="after")
    def _legal(self) -> "ParallelConfig":
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise UserError(
                "parallel.virtual_pipeline_model_parallel_size needs "
                "parallel.pipeline_model_parallel_size of 2 or more."
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError("parallel.sequence_parallel=true has no effect with parallel.tensor_model_parallel_size=1.")
        if self.sequence_parallel is False and self.tensor_model_parallel_size > 1:
            raise UserError(
                "parallel.sequence_parallel=false with parallel.tensor_model_parallel_size="
                f"{self.tensor_model_parallel_size}: megatron-core trains MoE under tensor parallelism only with "
                "sequence parallelism; leave it null."
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise UserError("parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true.")
        return self

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the dense weights and one sequence."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def num_stages(self) -> int:
        """Pipeline stages: ranks times model chunks per rank."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether activations between the tensor-parallel regions are sharded along the sequence."""
        return self.tensor_model_parallel_size > 1

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of replicas of the dense weights for a world size."""
        return world_size // self.model_parallel_size

    def check_against(self, model: ModelConfig, sequence_length: int, world_size: int) -> None:
        """Check that model, sequence length and world size are divisible by the layout's sizes.

        Raises: UserError naming the number and the divisor.
        """
        tp, cp, ep = (self.tensor_model_parallel_size, self.context_parallel_size, self.expert_model_parallel_size)
        etp, pp = self.expert_tensor_parallel_size, self.pipeline_model_parallel_size
        tensor, context, expert = (
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.context_parallel_size={cp}",
            f"parallel.expert_model_parallel_size={ep}",
        )
        _check_divisible("model.num_attention_heads", model.num_attention_heads, tensor, tp)
        _check_divisible("model.num_query_groups", model.num_query_groups, tensor, tp)
        by_heads = self.linear_context_parallel == "all_to_all"
        _check_divisible(
            "model.linear_num_key_heads",
            model.linear_num_key_heads,
            f"{tensor} × {context}" if by_heads else tensor,
            tp * cp if by_heads else tp,
        )
        if cp > 1 and SLIDING_ATTENTION in model.mixers and model.backend != "torch":
            raise UserError(
                f"{context} with model.mixer_pattern={model.mixer_pattern!r}: TransformerEngine's ring attention "
                "does not support a sliding window. Use parallel.context_parallel_size=1, a pattern without S, or "
                "model.backend=torch."
            )
        _check_divisible("model.vocab_size", model.vocab_size, tensor, tp)
        _check_divisible("model.hidden_size", model.hidden_size, tensor, tp)
        _check_divisible(
            "model.moe_shared_expert_intermediate_size", model.moe_shared_expert_intermediate_size, tensor, tp
        )
        _check_divisible("model.num_moe_experts", model.num_moe_experts, expert, ep)
        _check_divisible(
            "model.moe_ffn_hidden_size", model.moe_ffn_hidden_size, f"parallel.expert_tensor_parallel_size={etp}", etp
        )
        if cp > 1:
            _check_divisible("training.sequence_length", sequence_length, f"2 × {context} (zigzag halves)", 2 * cp)
        if self.uses_sequence_parallel:
            _check_divisible("training.sequence_length", sequence_length, f"{context} × {tensor}", cp * tp)
        # a stage may end at any sublayer, but must hold experts: megatron-core trains them with a separate optimizer,
        # and a stage without it could not load checkpoints of other layouts (megatron/core/optimizer/optimizer.py:1579)
        if self.num_stages > model.num_layers:
            raise UserError(
                f"{self.num_stages} pipeline stages (parallel.pipeline_model_parallel_size={pp} × "
                f"virtual {self.num_stages // pp}) for model.num_layers={model.num_layers}: some stage would hold no "
                "experts, and its optimizer state would not load in another layout; use at most one stage per layer."
            )
        _check_divisible(
            "the world size",
            world_size,
            f"{tensor} × parallel.pipeline_model_parallel_size={pp} × {context}",
            self.model_parallel_size,
        )
        _check_divisible(
            "the world size",
            world_size,
            f"parallel.expert_tensor_parallel_size={etp} × {expert} × parallel.pipeline_model_parallel_size={pp}",
            etp * ep * pp,
        )


def _check_divisible(what: str, number: int, by: str, divisor: int) -> None:
    if number % divisor:
        raise UserError(f"{what}={number} is not divisible by {by} (= {divisor}); change one of them.")
