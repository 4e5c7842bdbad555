"""Small Hugging Face models for the tests: saved by transformers, with random multi-token prediction tensors added.

transformers has no multi-token prediction, so those tensors are random, in the shapes of the parameter mappings;
tests/hf/test_model_mapping.py checks the positions of their values.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_q3n.hf import param_mappings
from megatron_q3n.hf.model_config import from_published
from megatron_q3n.hf.weights import CONFIG, INDEX, SINGLE
from tests.model.reference.test_model import move_from_init, qwen3_next

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def transformers_model(model_type: str, **fields: Any) -> nn.Module:
    """Return a random model of transformers whose weights differ from the initial values; fields of its config."""
    # first: it prevents the import of flash-linear-attention
    modeling = qwen3_next()
    if model_type == "qwen3_next":
        model = modeling.Qwen3NextForCausalLM(modeling.Qwen3NextConfig(**SIZES, **fields))
    else:
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

        model = moe.Qwen3_5MoeForCausalLM(moe.Qwen3_5MoeTextConfig(**SIZES, **fields))
    move_from_init(model)
    return model.eval()


def publish(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model as transformers does, in several shards, and add multi-token prediction."""
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    config, family = from_published(json.loads((folder / CONFIG).read_text()), has_mtp=True)
    generator = torch.Generator().manual_seed(7)
    mtp = {
        name: (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for mapping in param_mappings(config, family)
        for name, shape in mapping.hf.items()
        if name.startswith("mtp.")
    }
    save_file(mtp, folder / "mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(mtp, "mtp.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def as_released(folder: Path, source: Path) -> Path:
    """Rewrite a Qwen3.5 text model in the released format: part of a multimodal model, experts stacked."""
    tensors = stored(source)
    content = json.loads((source / CONFIG).read_text())
    experts = content["num_experts"]
    released = {"model.visual.patch_embed.proj.bias": torch.randn(3).bfloat16()}
    for name, tensor in tensors.items():
        stack, _, expert = name.partition(".experts.")
        if expert and not name.startswith("mtp."):
            if expert == "0.gate_proj.weight":
                parts = [
                    [tensors[f"{stack}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")] for e in range(experts)
                ]
                released[f"{stack}.experts.gate_up_proj"] = torch.stack([torch.cat(p) for p in parts])
                downs = [tensors[f"{stack}.experts.{e}.down_proj.weight"] for e in range(experts)]
                released[f"{stack}.experts.down_proj"] = torch.stack(downs)
        else:
            released[name] = tensor
    in_place = {
        name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.") and "visual" not in name
        else name: tensor
        for name, tensor in released.items()
    }
    folder.mkdir()
    save_file(in_place, folder / SINGLE, metadata={"format": "pt"})
    shell = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": 90,
        "text_config": content,
        "vision_config": {"depth": 1, "hidden_size": 16},
    }
    (folder / CONFIG).write_text(json.dumps(shell))
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a model folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def quiet(*_: object) -> None:
    """Ignore messages and progress."""
