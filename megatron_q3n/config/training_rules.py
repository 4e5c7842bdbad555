"""Rules between the sections of a run's configuration that hold for every training stage.

Rules of single stages are in `config/stage_rules.py`.
"""

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.execution_rules import step_graph_obstacle
from megatron_q3n.config.run_sections import RunSections


def check_training(config: RunSections) -> None:
    """Check batch, schedule, recompute, CUDA graph, FP8 and data settings against each other.

    Raises: UserError.
    """
    _check_batch(config)
    _check_schedule(config)
    _check_recompute(config)
    _check_graph(config)
    _check_fp8(config)
    _check_data(config)
    _check_balance(config)


def _check_batch(config: RunSections) -> None:
    training, layout = config.training, config.parallel
    if training.sequence_length > config.model.max_position_embeddings:
        raise UserError(
            f"training.sequence_length={training.sequence_length} is more than "
            f"model.max_position_embeddings={config.model.max_position_embeddings}; "
            "raise the latter or shorten."
        )
    per_pass = training.micro_batch_size * config.data_parallel_size
    if training.global_batch_size % per_pass:
        raise UserError(
            f"training.global_batch_size={training.global_batch_size} is not divisible by "
            f"training.micro_batch_size={training.micro_batch_size} × data parallel size "
            f"{config.data_parallel_size} (= {per_pass}); make it a multiple."
        )
    pipeline = layout.pipeline_model_parallel_size
    if layout.virtual_pipeline_model_parallel_size and config.num_microbatches % pipeline:
        raise UserError(
            f"{config.num_microbatches} micro-batches per step are not divisible by "
            f"parallel.pipeline_model_parallel_size={pipeline}, as interleaved stages need; "
            "change training.global_batch_size or training.micro_batch_size."
        )


def _check_schedule(config: RunSections) -> None:
    schedule, steps = config.schedule, config.training.steps
    if schedule.warmup_steps >= steps and schedule.warmup_steps:
        raise UserError(f"schedule.warmup_steps={schedule.warmup_steps} must be below training.steps={steps}.")
    if schedule.style == "wsd" and schedule.warmup_steps + (schedule.decay(steps) or 0) > steps:
        raise UserError(
            f"schedule.warmup_steps={schedule.warmup_steps} + "
            f"schedule.decay_steps={schedule.decay(steps)} is more than training.steps={steps}; "
            "shorten one of them."
        )


def _check_fp8(config: RunSections) -> None:
    """Refuse what FP8's matrix products cannot take: every dimension of theirs on a rank is a multiple of 16, for
    mxfp8 of 32."""
    if config.precision.fp8 is None:
        return
    model, layout = config.model, config.parallel
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    heads = f" / parallel.tensor_model_parallel_size={tensor}" if tensor > 1 else ""
    gated = 2 if model.gate_is_in_query_projection else 1
    key, value = (
        model.linear_num_key_heads * model.linear_key_head_dim,
        model.linear_num_value_heads * model.linear_value_head_dim,
    )
    queries, groups = model.num_attention_heads, model.num_query_groups
    tokens = config.training.micro_batch_size * config.training.sequence_length
    products = {
        "tokens of a micro-batch (training.micro_batch_size × sequence_length)": (tokens, context),
        "model.hidden_size": (model.hidden_size, 1),
        f"q|k|v|z of Gated DeltaNet{heads}": (2 * key + 2 * value, tensor),
        f"the values of Gated DeltaNet{heads}": (value, tensor),
        f"q|k|v of gated attention{heads}": ((gated * queries + 2 * groups) * model.kv_channels, tensor),
        f"the output of gated attention{heads}": (queries * model.kv_channels, tensor),
        f"model.moe_shared_expert_intermediate_size{heads}": (model.moe_shared_expert_intermediate_size, tensor),
    }
    multiple = 32 if config.precision.fp8_recipe == "mxfp8" else 16
    for what, (size, cut) in products.items():
        if size % (multiple * cut):
            raise UserError(
                f"precision.fp8={config.precision.fp8}: {what} is {size // cut} on a rank, and FP8's matrix "
                f"products take multiples of {multiple}; change it, or set precision.fp8=null."
            )


def _check_graph(config: RunSections) -> None:
    obstacle = step_graph_obstacle(config)
    if config.training.cuda_graph and obstacle:
        raise UserError(f"training.cuda_graph=true: {obstacle}; set it false or change the other setting.")


def _check_recompute(config: RunSections) -> None:
    if config.precision.fp8 and "moe_act" in config.training.recompute_modules:
        raise UserError(
            "training.recompute_modules=[moe_act] has no effect with precision.fp8: the FP8 experts keep their "
            "activations for the weight gradient; use moe, or leave it out."
        )
    method, sublayers = config.training.recompute_method, config.training.recompute_num_layers
    full = config.training.recompute_granularity == "full"
    if full and config.model.mtp_num_layers and (method, sublayers) != ("uniform", 1):
        raise UserError(
            f"training.recompute_method={method} with training.recompute_num_layers={sublayers}: "
            "megatron-core recomputes MTP layers only with uniform and 1; set these, or "
            "model.mtp_num_layers=0."
        )


def _check_data(config: RunSections) -> None:
    if config.data.source == "stdlib" and config.data.stdlib_vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.stdlib_vocab_size={config.data.stdlib_vocab_size} is more than "
            f"model.vocab_size={config.model.vocab_size}; the model needs a row for every token."
        )
    if not config.data.mask_document_boundaries:
        return
    if config.training.micro_batch_size != 1:
        raise UserError(
            "data.mask_document_boundaries=true packs documents into one row: "
            f"training.micro_batch_size must be 1, found {config.training.micro_batch_size}. "
            "Use a longer sequence or more micro-batches instead."
        )
    alignment, context = config.data.document_alignment, config.parallel.context_parallel_size
    if context > 1 and alignment % (2 * context):
        raise UserError(
            f"data.document_alignment={alignment} must be a multiple of 2 × "
            f"parallel.context_parallel_size={context} (= {2 * context}): every document is cut "
            "into so many equal chunks."
        )
    if config.training.sequence_length % alignment:
        raise UserError(
            f"training.sequence_length={config.training.sequence_length} is not divisible by "
            f"data.document_alignment={alignment}; make it a multiple."
        )


def _check_balance(config: RunSections) -> None:
    model = config.model
    if model.moe_router_load_balancing_type != "seq_aux_loss" or model.moe_aux_loss_coeff == 0:
        return
    packs_conversations = config.stage in ("sft", "rl") or bool(config.stage == "mtp" and config.sft.train)
    if packs_conversations or config.data.mask_document_boundaries:
        reason = f"stage={config.stage}" if packs_conversations else "data.mask_document_boundaries=true"
        raise UserError(
            f"model.moe_router_load_balancing_type=seq_aux_loss balances each row as one sequence, but {reason} packs "
            "several documents into a row; set it to global_aux_loss or aux_loss."
        )
