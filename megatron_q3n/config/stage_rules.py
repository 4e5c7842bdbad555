"""Rules between the sections of a run's configuration that hold for some stages only: start, evaluate, mtp, sft, rl.

The rules of every training run are in `config/training_rules.py`.
"""

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.mtp import MtpConfig
from megatron_q3n.config.run_sections import RunSections
from megatron_q3n.config.sft import SftConfig


def check_start(config: RunSections) -> None:
    """Check which checkpoint the run starts from, and that its callbacks can be called.

    Raises: UserError.
    """
    if config.stage == "longcontext" and config.checkpoint.load is None:
        raise UserError(
            "stage=longcontext continues a trained model: say which with checkpoint.load=RUN_DIR "
            "(or a checkpoint in one, e.g. checkpoint.load=runs/latest)."
        )
    if config.stage in ("generate", "serve") and config.checkpoint.load is None:
        raise UserError(
            f"stage={config.stage} needs a trained model: say which with checkpoint.load=RUN_DIR "
            "(or a checkpoint in one, e.g. checkpoint.load=runs/latest)."
        )
    if config.checkpoint.load_optimizer and config.checkpoint.load is None:
        raise UserError("checkpoint.load_optimizer=true has no effect without checkpoint.load.")
    is_pretraining = config.stage in ("pretrain", "longcontext") or (config.stage == "mtp" and not config.sft.train)
    if config.checkpoint.load_other_tokenizer and not (config.checkpoint.load and is_pretraining):
        raise UserError(
            f"checkpoint.load_other_tokenizer=true has no effect with stage={config.stage}, or without "
            "checkpoint.load: it allows continued pretraining on text of another tokenizer; set it to false."
        )
    if config.callbacks and config.stage in ("generate", "serve", "evaluate"):
        raise UserError(
            f"callbacks have no effect with stage={config.stage}: they extend a training run; set them to []."
        )


def check_evaluate(config: RunSections) -> None:
    """Check the combination of evaluation settings, checkpoint and parallel layout.

    Raises: UserError for a combination that evaluation does not support.
    """
    settings, layout = config.evaluate, config.parallel
    if config.checkpoint.load is None:
        raise UserError(
            "stage=evaluate needs a trained model: set checkpoint.load=RUN_DIR "
            "(or a checkpoint in one, e.g. checkpoint.load=runs/latest)."
        )
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(layout, name) > 1:
            raise UserError(
                f"parallel.{name}={getattr(layout, name)}: evaluation supports tensor and expert parallelism "
                "only; set it to 1 (a checkpoint loads in any layout)."
            )
    if not (settings.num_sequences or settings.tasks or settings.recall_lengths):
        raise UserError(
            "evaluate.num_sequences=0, no evaluate.tasks and no evaluate.recall_lengths leave nothing to measure."
        )
    if any(length < 2 for length in settings.recall_lengths):
        raise UserError(
            f"evaluate.recall_lengths={settings.recall_lengths}: the first token of a copy cannot be recalled and is "
            "not counted, so each length must be at least 2."
        )
    if settings.tasks and settings.tasks_dir is None:
        raise UserError(
            f"evaluate.tasks={settings.tasks} needs evaluate.tasks_dir, the folder with their .yaml files; tasks are "
            "read from local files only."
        )
    if settings.context_tokens % settings.position_buckets:
        raise UserError(
            f"evaluate.context_tokens={settings.context_tokens} is not divisible by evaluate.position_buckets="
            f"{settings.position_buckets}; make it a multiple."
        )
    tp_size = layout.tensor_model_parallel_size
    if settings.context_tokens % tp_size:
        raise UserError(
            f"evaluate.context_tokens={settings.context_tokens} is not divisible by "
            f"parallel.tensor_model_parallel_size={tp_size}; make it a multiple."
        )
    if settings.draft_depth and settings.draft_stride >= settings.context_tokens:
        raise UserError(
            f"evaluate.draft_stride={settings.draft_stride} must be below evaluate.context_tokens="
            f"{settings.context_tokens}, or no position would be scored."
        )


def check_mtp(config: RunSections) -> None:
    """Check the mtp settings against the model and the stage.

    Raises: UserError for a combination that cannot be trained.
    """
    mtp, model, depths = config.mtp, config.model, config.model.mtp_num_layers
    uses = config.stage == "mtp" or mtp != MtpConfig()
    if uses and depths == 0:
        raise UserError(
            "model.mtp_num_layers=0 builds no multi-token prediction layer to train or to draft with; set it to the "
            "number of depths."
        )
    if mtp.depth_weights and len(mtp.depth_weights) != depths:
        raise UserError(
            f"mtp.depth_weights has {len(mtp.depth_weights)} entries for model.mtp_num_layers={depths} depths; "
            "give one weight for each depth."
        )
    separate_layers = depths > 1 and not model.mtp_use_repeated_layer
    if separate_layers and (mtp.method == "inference" or mtp.acceptance_depth):
        raise UserError(
            f"model.mtp_num_layers={depths} separate MTP layers: drafting repeats one layer; set "
            "model.mtp_use_repeated_layer=true."
        )
    if mtp.trunk == "frozen" and config.stage != "mtp":
        raise UserError(
            f"mtp.trunk=frozen with stage={config.stage} leaves this stage no parameter to train; "
            "use detached, or stage=mtp."
        )
    if mtp.trunk == "frozen" and config.checkpoint.load is None:
        raise UserError(
            "mtp.trunk=frozen needs a trained trunk: set checkpoint.load=RUN_DIR (or a checkpoint directory in it)."
        )
    if config.stage == "mtp" and config.sft == SftConfig():
        return
    if config.stage == "mtp" and not config.sft.train:
        raise UserError(
            "stage=mtp with sft settings but no sft.train: set sft.train to conversations, or remove the sft "
            "settings to train on data."
        )


def check_sft(config: RunSections) -> None:
    """Check fine-tuning on packed conversations.

    Raises: UserError.
    """
    if not config.sft.train:
        raise UserError(
            "stage=sft needs sft.train, a list of sources: "
            "'sft.train=[{path: conversations.jsonl}]' or [{task: {name: chain_sum}}]."
        )
    vocab_size = config.sft.tokenizer_vocab_size
    if vocab_size and (config.checkpoint.load or config.data.tokenizer):
        raise UserError(
            f"sft.tokenizer_vocab_size={vocab_size} would replace the tokenizer of checkpoint.load or data.tokenizer; "
            "set it to null."
        )
    cp_size, alignment = config.parallel.context_parallel_size, config.sft.alignment
    if cp_size > 1 and alignment % (2 * cp_size):
        raise UserError(
            f"sft.alignment={alignment} must be a multiple of 2 × parallel.context_parallel_size={cp_size} "
            f"(= {2 * cp_size}): every conversation is split into this many equal chunks."
        )
    if config.training.sequence_length % alignment:
        raise UserError(
            f"training.sequence_length={config.training.sequence_length} is not divisible by sft.alignment="
            f"{alignment}; make it a multiple."
        )
    _check_packing(config)


def check_rl(config: RunSections) -> None:
    """Check the prompts, layout and intervals of reinforcement learning.

    Raises: UserError.
    """
    rl = config.rl
    if not rl.prompts:
        raise UserError(
            "stage=rl needs rl.prompts, a list of sources: 'rl.prompts=[{task: {name: chain_sum}}]' "
            "or [{path: prompts.jsonl}]."
        )
    if rl.reward.kind == "task" and any(source.task is None for source in rl.prompts):
        raise UserError(
            "rl.reward.kind=task scores questions of task sets, but rl.prompts has a file; use "
            "rl.reward.kind=math_verify or function."
        )
    _check_packing(config)
    _check_rl_layout(config)
    _check_rl_intervals(config)


def _check_rl_layout(config: RunSections) -> None:
    rl, layout = config.rl, config.parallel
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
            "parallel.overlap_grad_reduce=true needs a gradient of every parameter, but MTP layers get none from "
            "the policy loss; set it to false."
        )
    if rl.routing_replay and layout.pipeline_model_parallel_size > 1 and _recomputes_experts(config):
        raise UserError(
            "rl.routing_replay=true with pipeline stages and activation checkpointing (recompute) of experts: the "
            "recomputation would replay another micro-batch's routes; do not recompute moe, or set "
            "rl.routing_replay=false."
        )


def _check_rl_intervals(config: RunSections) -> None:
    rl = config.rl
    if config.training.steps % rl.updates_per_rollout:
        raise UserError(
            f"training.steps={config.training.steps} is not divisible by rl.updates_per_rollout="
            f"{rl.updates_per_rollout}; the last rollout would be used only in part."
        )
    interval = config.checkpoint.interval_steps
    if interval % rl.updates_per_rollout:
        raise UserError(
            f"checkpoint.interval_steps={interval} is not divisible by rl.updates_per_rollout="
            f"{rl.updates_per_rollout}: checkpoints are saved between rollouts."
        )
    if rl.rollout.max_new_tokens >= config.training.sequence_length:
        raise UserError(
            f"rl.rollout.max_new_tokens={rl.rollout.max_new_tokens} must be below training.sequence_length="
            f"{config.training.sequence_length}, the row that holds a prompt and its response."
        )


def _check_packing(config: RunSections) -> None:
    if config.training.micro_batch_size != 1:
        raise UserError(
            f"stage={config.stage} packs conversations into one row: training.micro_batch_size must be 1, found "
            f"{config.training.micro_batch_size}. Use a longer sequence or more micro-batches instead."
        )
    if config.data.mask_document_boundaries:
        raise UserError(
            f"data.mask_document_boundaries has no effect with stage={config.stage}: packed conversations are always "
            "independent; set it to false."
        )


def _recomputes_experts(config: RunSections) -> bool:
    training = config.training
    return training.recompute_granularity == "full" or "moe" in training.recompute_modules
