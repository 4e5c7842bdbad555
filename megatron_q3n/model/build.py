"""Model construction: from a RunConfig to the model chunks of this rank.

transformer_config -> hybrid pattern with pipeline cuts -> one HybridModel per virtual pipeline stage.
"""

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_q3n.config import GATED_ATTENTION, SLIDING_ATTENTION, RunConfig
from megatron_q3n.config.execution_plan import ExecutionPlan
from megatron_q3n.config.execution_rules import draws_random_numbers
from megatron_q3n.config.model import MOE
from megatron_q3n.config.sizes import pipeline_segments
from megatron_q3n.kernels.moe.expert_exchange import (
    CollectiveExchange,
    ExchangeShape,
    ExpertExchange,
    SymmetricExchange,
)
from megatron_q3n.model.mtp.accumulators import MTPLosses
from megatron_q3n.model.patches import patch_megatron
from megatron_q3n.model.sharding import drop_extra_state
from megatron_q3n.model.spec import backend_named, stack_spec
from megatron_q3n.model.transformer_config import BackendName, transformer_config


class Qwen3NextModel(HybridModel):
    """HybridModel whose checkpoints are independent of the backend."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Describe the parameters to dist_checkpointing, without TransformerEngine's extra state."""
        return drop_extra_state(super().sharded_state_dict(*args, **kwargs))


def build_model(config: RunConfig, backend_name: BackendName, groups: ProcessGroupCollection) -> list[Qwen3NextModel]:
    """Build this rank's model chunks (one, or one per virtual pipeline stage), initialized from the seed."""
    backend = backend_named(backend_name)
    patch_megatron(backend.norm, keeps_rng=draws_random_numbers(config))
    megatron = transformer_config(config, backend_name)
    _check_groups(config, groups)
    if megatron.plan.moe.expert_exchange:
        megatron.pass_state.expert_exchange = _expert_exchange(config, megatron.plan, groups)
    if config.model.mtp_num_layers:
        megatron.pass_state.mtp = MTPLosses(config.model.mtp_num_layers, config.mtp, config.training.steps)
    spec = stack_spec(config, backend)
    rank, stages = groups.pp.rank(), config.parallel.num_stages
    pipeline_size = config.parallel.pipeline_model_parallel_size
    chunks = []
    for chunk in range(stages // pipeline_size):
        stage = chunk * pipeline_size + rank
        model = Qwen3NextModel(
            megatron,
            spec,
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.max_position_embeddings,
            hybrid_layer_pattern=hybrid_pattern(config),
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            position_embedding_type="rope",
            rotary_percent=config.model.rotary_percent,
            rotary_base=config.model.rotary_base,
            share_embeddings_and_output_weights=False,
            pg_collection=groups,
            vp_stage=chunk if stages > pipeline_size else None,
        )
        _check_built(model, config, is_last=stage == stages - 1)
        if model.mtp_process:
            model.mtp.rotary = model.rotary_pos_emb
        chunks.append(model)
    return chunks


def hybrid_pattern(config: RunConfig) -> str:
    """Return e.g. "GEGE|GE*E/*E": sublayers, `|` between pipeline stages, `/` before each MTP depth.

    The planner assumes the same cuts (config/sizes.py).
    """
    main = "|".join(pipeline_segments(config.model, config.parallel.num_stages))
    # VariantAttention derives its window from the layer number
    main = main.replace(SLIDING_ATTENTION, GATED_ATTENTION)
    return main + f"/{GATED_ATTENTION}{MOE}" * config.model.mtp_num_layers


def _expert_exchange(config: RunConfig, plan: ExecutionPlan, groups: ProcessGroupCollection) -> ExpertExchange:
    """Make the exchange between expert-parallel ranks; a collective call where it allocates symmetric memory."""
    if not plan.moe.symmetric_memory:
        return CollectiveExchange(groups.ep)
    model = config.model
    shape = ExchangeShape(config.tokens_per_rank, model.hidden_size, model.num_moe_experts, model.moe_router_topk)
    return SymmetricExchange(groups.ep, shape, torch.device("cuda", torch.cuda.current_device()))


def _check_groups(config: RunConfig, groups: ProcessGroupCollection) -> None:
    """Check that the process groups have the sizes that the settings, and so the plan, assume."""
    layout = config.parallel
    sizes = {
        "tp": layout.tensor_model_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
        "cp": layout.context_parallel_size,
        "ep": layout.expert_model_parallel_size,
        "expt_tp": layout.expert_tensor_parallel_size,
    }
    for name, size in sizes.items():
        found = getattr(groups, name).size()
        assert found == size, f"process group {name} has {found} ranks, the configuration {size}"


def _check_built(model: Qwen3NextModel, config: RunConfig, is_last: bool) -> None:
    """Check that MTP was built, which HybridModel silently omits if pattern and mtp_num_layers disagree, and fp32."""
    has_mtp = is_last and config.model.mtp_num_layers > 0
    assert model.mtp_process == has_mtp, f"mtp_process is {model.mtp_process}, expected {has_mtp} on this stage"
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "out_norm.weight")):
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
