"""Small model with weights far from their initialization, so that every layer matters; and its full forward pass."""

from typing import Any

import torch

from megatron_q3n.config import RunConfig, validate

TINY = {"hidden_size": 32, "vocab_size": 64, "max_position_embeddings": 2048}


def tiny_config(compute: str = "fp32", **settings: Any) -> RunConfig:
    """Return the configuration of `tiny_model`."""
    data = {"source": "blend", "train": [{"path": "unused"}]}
    return validate({"model": {**TINY, **settings}, "data": data, "precision": {"compute": compute}})


def tiny_model(alone: Any, seed: int = 0, compute: str = "fp32", **settings: Any) -> Any:
    """Build the model on the process groups of `alone`; imports megatron-core late."""
    from megatron_q3n.model.build import build_model

    device, parallel = alone
    config = tiny_config(compute, **settings)
    model = build_model(config, device.model_backend, parallel.groups)[0].to(device.torch_device)
    return move_from_init(model, seed)


def move_from_init(model: Any, seed: int = 0) -> Any:
    """Set matrices to normal entries of scale 0.2, and the decay of Gated DeltaNet to a memory of some tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if name.endswith("A_log"):
                parameter.fill_(-2.0)
    return model


@torch.no_grad()
def full_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the logits [T,V] of the model's own forward pass over a whole sequence."""
    from megatron_q3n.model.decode.forward import generating

    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    positions = torch.arange(len(tokens), device=ids.device)[None]
    mtp, model.mtp_process = model.mtp_process, False
    with generating(model):
        logits = model(ids, positions, None, runtime_gather_output=True)[0]
    model.mtp_process = mtp
    return logits.float().cpu()


def random_prompts(lengths: list[int], vocab: int, seed: int = 1) -> list[list[int]]:
    """Return prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]
