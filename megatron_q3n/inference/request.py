"""What may be asked of a model: checked before anything is built, and again by whoever holds the model."""

from dataclasses import dataclass
from typing import Any

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.inference.sampling import Sampling


@dataclass(frozen=True)
class Abilities:
    """What bounds generation: sizes of the model, and of the layout it is spread over."""

    vocab_size: int
    positions: int
    num_mtp_layers: int  # layers with weights of their own
    pipeline_size: int
    context_size: int
    sends_equal_shares: bool  # of tokens to experts on other replicas

    @classmethod
    def configured(cls, config: RunConfig) -> "Abilities":
        """Return those that a configuration promises."""
        model, layout = config.model, config.parallel
        repeated = model.mtp_use_repeated_layer and model.mtp_num_layers > 0
        return cls(
            model.vocab_size,
            model.max_position_embeddings,
            1 if repeated else model.mtp_num_layers,
            layout.pipeline_model_parallel_size,
            layout.context_parallel_size,
            layout.moe_token_dispatcher_type == "allgather"
            and layout.expert_model_parallel_size > 1
            and config.data_parallel_size > 1,
        )

    @classmethod
    def of(cls, model: Any) -> "Abilities":
        """Return those of a built model."""
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
        """Refuse what this model cannot do.

        Raises: UserError for an empty or too long prompt, an unknown token, drafts without MTP, or a
            layout that generation does not know.
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
                    f"parallel.{name}_parallel_size={size}: generation spreads a model by tensor and expert "
                    "parallelism only; set it to 1 (a checkpoint loads in any layout)."
                )
        if self.sends_equal_shares:
            raise UserError(
                "parallel.moe_token_dispatcher_type=allgather takes equally many tokens from every rank, "
                "which ranks that generate on their own do not have; use alltoall."
            )

    def _check_drafts(self, draft_depth: int) -> None:
        if draft_depth and self.num_mtp_layers == 0:
            raise UserError(
                f"a draft depth of {draft_depth} needs a multi-token prediction layer, and this model has "
                "none (model.mtp_num_layers=0); use a depth of 0, or a checkpoint trained with one."
            )
        if draft_depth and self.num_mtp_layers > 1:
            raise UserError(
                f"this model has {self.num_mtp_layers} separate MTP layers; drafts come from one layer that "
                "is repeated (model.mtp_use_repeated_layer=true, or model.mtp_num_layers=1); use a depth of 0."
            )

    def _check_prompt(self, name: str, prompt: list[int], sampling: Sampling) -> None:
        if not prompt:
            raise UserError(f"{name} is empty: give at least one token.")
        outside = next((token for token in prompt if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise UserError(f"{name} holds token {outside}; the vocabulary's ids go from 0 to {self.vocab_size - 1}.")
        wanted = len(prompt) + sampling.max_new_tokens
        if wanted > self.positions:
            raise UserError(
                f"{name} has {len(prompt)} tokens, and {sampling.max_new_tokens} new ones make {wanted}: more "
                f"than model.max_position_embeddings={self.positions}. Shorten the prompt or generate less."
            )
