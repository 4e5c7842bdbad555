"""What fine-tuning and reinforcement learning ask of the other sections of a configuration."""

from typing import TYPE_CHECKING

from megatron_q3n.config.errors import UserError

if TYPE_CHECKING:
    from megatron_q3n.config.run import RunConfig  # it imports this file


def check_sft(config: "RunConfig") -> None:
    """Refuse what fine-tuning on packed conversations cannot do.

    Raises: UserError.
    """
    if not config.sft.train:
        raise UserError(
            "stage=sft needs sft.train, a list of sources: "
            "'sft.train=[{path: conversations.jsonl}]' or [{task: {name: chain_sum}}]."
        )
    trained = config.sft.tokenizer_vocab_size
    if trained and (config.checkpoint.load or config.data.tokenizer):
        raise UserError(
            f"sft.tokenizer_vocab_size={trained} would replace the tokenizer of checkpoint.load or data.tokenizer; "
            "set it to null."
        )
    context, alignment = config.parallel.context_parallel_size, config.sft.alignment
    if context > 1 and alignment % (2 * context):
        raise UserError(
            f"sft.alignment={alignment} must be a multiple of 2 × parallel.context_parallel_size={context} "
            f"(= {2 * context}): every conversation is cut into so many equal chunks."
        )
    if config.training.sequence_length % alignment:
        raise UserError(
            f"training.sequence_length={config.training.sequence_length} is not divisible by sft.alignment="
            f"{alignment}; make it a multiple."
        )
    _check_packing(config)


def check_rl(config: "RunConfig") -> None:
    """Refuse what the reinforcement learning loop cannot do.

    Raises: UserError.
    """
    rl, layout = config.rl, config.parallel
    if not rl.prompts:
        raise UserError(
            "stage=rl needs rl.prompts, a list of sources: 'rl.prompts=[{task: {name: chain_sum}}]' "
            "or [{path: prompts.jsonl}]."
        )
    if rl.reward.kind == "task" and any(source.task is None for source in rl.prompts):
        raise UserError(
            "rl.reward.kind=task grades questions of task sets, and rl.prompts names a file; use "
            "rl.reward.kind=math_verify or function."
        )
    _check_packing(config)
    if layout.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size={layout.context_parallel_size}: the policy loss needs whole sequences; "
            "set it to 1."
        )
    if layout.pipeline_model_parallel_size > 1 and rl.rollout.engine == "in_process":
        raise UserError(
            f"parallel.pipeline_model_parallel_size={layout.pipeline_model_parallel_size}: the in-process engine "
            "does not generate over pipeline stages; set it to 1, or rl.rollout.engine=http."
        )
    if layout.overlap_grad_reduce:
        raise UserError(
            "parallel.overlap_grad_reduce=true waits for a gradient of every parameter, and MTP layers get none "
            "from the policy loss; set it to false."
        )
    if rl.routing_replay and layout.pipeline_model_parallel_size > 1 and _recomputes_experts(config):
        raise UserError(
            "rl.routing_replay=true with pipeline stages that recompute experts: by then another micro-batch's "
            "routes are in place; do not recompute moe, or set rl.routing_replay=false."
        )
    if config.training.steps % rl.updates_per_rollout:
        raise UserError(
            f"training.steps={config.training.steps} is not divisible by rl.updates_per_rollout="
            f"{rl.updates_per_rollout}; the last rollout would be left half used."
        )
    interval = config.checkpoint.interval_steps
    if interval % rl.updates_per_rollout:
        raise UserError(
            f"checkpoint.interval_steps={interval} is not divisible by rl.updates_per_rollout="
            f"{rl.updates_per_rollout}: a run is saved between rollouts."
        )
    if rl.rollout.max_new_tokens >= config.training.sequence_length:
        raise UserError(
            f"rl.rollout.max_new_tokens={rl.rollout.max_new_tokens} must be below training.sequence_length="
            f"{config.training.sequence_length}, the row a prompt and its answer must fit in."
        )


def _check_packing(config: "RunConfig") -> None:
    if config.training.micro_batch_size != 1:
        raise UserError(
            f"stage={config.stage} packs conversations into one row: training.micro_batch_size must be 1, found "
            f"{config.training.micro_batch_size}. Use a longer sequence or more micro-batches instead."
        )
    if config.data.mask_document_boundaries:
        raise UserError(
            f"data.mask_document_boundaries has no effect with stage={config.stage}: conversations never see each "
            "other; leave it false."
        )


def _recomputes_experts(config: "RunConfig") -> bool:
    training = config.training
    return training.recompute_granularity == "full" or "moe" in training.recompute_modules
