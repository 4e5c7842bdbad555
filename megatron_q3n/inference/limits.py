"""Limits of generation requests, checked from the configuration before the model is built and again from the model."""

from dataclasses import dataclass

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.model.decode.protocols import DecodeModel


@dataclass(frozen=True)
class GenerationLimits:
    """Sizes of the model and of its parallel layout that limit generation.

    `num_mtp_layers` counts layers with separate weights. `needs_equal_tokens_per_rank`: the MoE all-gather dispatcher
    runs across replicas.
    """

    vocab_size: int
    max_positions: int
    num_mtp_layers: int
    pipeline_size: int
    context_size: int
    needs_equal_tokens_per_rank: bool

    @classmethod
    def from_config(cls, config: RunConfig) -> "GenerationLimits":
        """Return the limits of the model that a configuration describes."""
        model, layout = config.model, config.parallel
        is_repeated = model.mtp_use_repeated_layer and model.mtp_num_layers > 0
        return cls(
            model.vocab_size,
            model.max_position_embeddings,
            1 if is_repeated else model.mtp_num_layers,
            layout.pipeline_model_parallel_size,
            layout.context_parallel_size,
            layout.moe_token_dispatcher_type == "allgather"
            and layout.expert_model_parallel_size > 1
            and config.data_parallel_size > 1,
        )

    @classmethod
    def from_model(cls, model: DecodeModel) -> "GenerationLimits":
        """Return the limits of a built model."""
        groups = model.pg_collection
        return cls(
            model.vocab_size,
            model.max_sequence_length,
            len(model.mtp.layers) if model.mtp_process else 0,
            groups.pp.size(),
            groups.cp.size(),
            model.config.moe_token_dispatcher_type == "allgather" and groups.ep.size() > 1 and groups.dp.size() > 1,
        )

    def check(self, prompts: list[list[int]], sampling: Sampling, draft_depth: int) -> None:
        """Check a request.

        Raises: UserError for an empty or too long prompt, an unknown token, drafts without an MTP layer, or an
            unsupported parallel layout.
        """
        self._check_layout()
        self._check_drafts(draft_depth)
        for index, prompt in enumerate(prompts):
            self._check_prompt(f"prompt {index + 1}", prompt, sampling)
        unknown = [t for t in sorted(sampling.stop_tokens) if not 0 <= t < self.vocab_size]
        if unknown:
            raise UserError(
                f"stop token {unknown[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}."
            )

    def _check_layout(self) -> None:
        sizes = {"pipeline_model": self.pipeline_size, "context": self.context_size}
        for name, size in sizes.items():
            if size > 1:
                raise UserError(
                    f"parallel.{name}_parallel_size={size}: generation supports tensor and expert parallelism only; "
                    "set it to 1 (a checkpoint loads in any layout)."
                )
        if self.needs_equal_tokens_per_rank:
            raise UserError(
                "parallel.moe_token_dispatcher_type=allgather needs equally many tokens on every rank, but ranks "
                "generate different numbers of tokens; use alltoall."
            )

    def _check_drafts(self, draft_depth: int) -> None:
        if draft_depth and self.num_mtp_layers == 0:
            raise UserError(
                f"a draft depth of {draft_depth} needs a multi-token prediction layer, and this model has "
                "none (model.mtp_num_layers=0); use a depth of 0, or a checkpoint trained with one."
            )
        if draft_depth and self.num_mtp_layers > 1:
            raise UserError(
                f"this model has {self.num_mtp_layers} separate MTP layers, but drafting repeats one layer "
                "(model.mtp_use_repeated_layer=true, or model.mtp_num_layers=1); use a depth of 0."
            )

    def _check_prompt(self, name: str, prompt: list[int], sampling: Sampling) -> None:
        if not prompt:
            raise UserError(f"{name} is empty: give at least one token.")
        unknown = next((token for token in prompt if not 0 <= token < self.vocab_size), None)
        if unknown is not None:
            raise UserError(
                f"{name} contains token {unknown}; the vocabulary's ids go from 0 to {self.vocab_size - 1}."
            )
        length = len(prompt) + sampling.max_new_tokens
        if length > self.max_positions:
            raise UserError(
                f"{name} has {len(prompt)} tokens, and {sampling.max_new_tokens} new ones make {length}: more "
                f"than model.max_position_embeddings={self.max_positions}. Shorten the prompt or generate less."
            )
