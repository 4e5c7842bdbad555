"""Compatibility of a checkpoint's weights with a model, by the manifest alone, before anything is loaded."""

from pathlib import Path
from typing import Any

from megatron_q3n.config import ModelConfig, UserError

# settings that may differ between two models with the same weights
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


def check_architecture(manifest: dict[str, Any], model: ModelConfig, checkpoint: Path) -> None:
    """Check that the weights described by a checkpoint's manifest fit this model.

    Raises: UserError naming the settings that differ.
    """
    # a setting that the manifest lacks was added later and had its default
    saved = _by_mtp_weights(ModelConfig().model_dump(mode="json") | manifest["model"])
    expected = _by_mtp_weights(model.model_dump(mode="json"))
    differences = [
        f"model.{name}: {saved.get(name)} there, {value} here"
        for name, value in expected.items()
        if name not in _FREE and saved.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{checkpoint} holds a model of another architecture: " + "; ".join(differences) + ". Set the model to "
            "the checkpoint's, or load another checkpoint."
        )


def _by_mtp_weights(model: dict[str, Any]) -> dict[str, Any]:
    """Count MTP layers by their weights: one layer repeated for several depths has the weights of one layer."""
    depths, is_repeated = model.get("mtp_num_layers"), model.get("mtp_use_repeated_layer")
    num_layers = 1 if is_repeated and depths else depths
    return {**model, "mtp_num_layers": num_layers, "mtp_use_repeated_layer": False}
