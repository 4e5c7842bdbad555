"""Whether a checkpoint's weights fit a model, by its description alone: asked before anything is loaded."""

from pathlib import Path
from typing import Any

from megatron_q3n.config import ModelConfig, UserError

# what may differ between two models that share weights
_FREE = {
    "name",
    "backend",
    "max_position_embeddings",
    "rotary_base",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_load_balancing_type",
    "mtp_loss_scaling_factor",
    "init_method_std",
    "embedding_init_method_std",
    "linear_chunk_size",
    "linear_time_step_init",
    "moe_router_normalized_init",
    "moe_router_bias_update_rate",
    "attention_window_tokens",
    "megatron",
}


def check_architecture(description: dict[str, Any], model: ModelConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint whose weights do not fit this model, naming the settings that differ."""
    # what the description does not know yet had its default
    known = ModelConfig().model_dump(mode="json") | description["model"]
    saved = _with_layers_of_its_own(known)
    wanted = _with_layers_of_its_own(model.model_dump(mode="json"))
    differ = [
        f"model.{name}: {saved.get(name)} there, {value} here"
        for name, value in wanted.items()
        if name not in _FREE and saved.get(name) != value
    ]
    if differ:
        raise UserError(f"{checkpoint} holds a model of another architecture: " + "; ".join(differ) + ".")


def _with_layers_of_its_own(model: dict[str, Any]) -> dict[str, Any]:
    """Count MTP layers by their weights: one that is repeated for several depths fits one that is not."""
    depths, repeated = model.get("mtp_num_layers"), model.get("mtp_use_repeated_layer")
    own = 1 if repeated and depths else depths
    return {**model, "mtp_num_layers": own, "mtp_use_repeated_layer": False}
