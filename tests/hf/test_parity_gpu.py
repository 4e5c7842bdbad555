"""A published model, imported, is transformers' model on every backend: logits, loss and gradients.

Through the files: transformers saves, megatron_q3n imports, a backend loads. In bf16 no fixed number tells
rounding from a small fault: transformers' own bf16 is the measure, and every expert takes every token,
since rounding would send some elsewhere. Multi-token prediction, which transformers lacks, is carried but
switched off. Export: tests/conversion/test_round_trip.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_q3n import hf
from megatron_q3n.conversion.importing import import_weights
from tests.backends import MODEL, Backend
from tests.hf.published import SIZES, publish, quiet
from tests.model.reference.test_model import move_from_init, qwen3_next
from tests.model.test_packing import GATES, gradients_of

ROWS, TOKENS = 2, 150  # not a multiple of the chunk
EXACT = 1e-4  # in parts of a tensor's norm; fp32, 3e-6 on a CPU
# times transformers' own error in bf16, which is about 3 % of logits and 5 % of gradients
ROUGH = 2.0
ROUGH_GATES = 5.0  # of A_log and dt_bias, a few numbers that are small sums of large terms
WITHOUT_MTP = {"mtp_loss_scaling_factor": 0.0, "moe_aux_loss_coeff": 0.0, "moe_router_load_balancing_type": "none"}


def transformers_model(top_k: int) -> nn.Module:
    """Make a random model of transformers, far from its init, with the heads that the kernels are made for."""
    heads = {name: size for name, size in MODEL.items() if name.startswith("linear_")}
    modeling = qwen3_next()  # without flash-linear-attention: its torch path is the reference
    sizes = SIZES | heads | {"hidden_size": 64, "num_experts_per_tok": top_k}
    sizes |= {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = modeling.Qwen3NextForCausalLM(modeling.Qwen3NextConfig(**sizes))
    move_from_init(model)
    return model.train()


def theirs(model: nn.Module, tokens: Tensor) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Return logits, loss and gradients of transformers."""
    model.zero_grad()
    logits = model(tokens[:, :-1]).logits.float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return logits.detach(), loss.item(), {n: p.grad.float() for n, p in model.named_parameters()}


def ours(state: Any, tokens: Tensor) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Return logits, loss and gradients of ours, the latter under megatron-core's names."""
    from megatron_q3n.data.batch import causal_batch

    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    rows = causal_batch(inputs.cpu(), labels.cpu(), torch.ones(ROWS, TOKENS))
    report, gradients = gradients_of(state, [rows])
    positions = torch.arange(TOKENS, device=tokens.device).expand(ROWS, -1)
    with torch.no_grad():
        logits = state.models[0].eval()(inputs, positions, None).float()
    return logits, report.loss, gradients


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return how far a tensor is off, in parts of the wanted one's norm."""
    return ((found - wanted).norm() / wanted.norm()).item()


def test_imported_model_is_transformers_model(backend: Backend, tmp_path: Path) -> None:
    from megatron_q3n import checkpoint

    exact = backend.compute == "fp32"
    device = backend.alone[0].torch_device
    reference = transformers_model(2 if exact else SIZES["num_experts"])
    source = publish(tmp_path / "hf", reference)
    reference.to(device)
    import_weights(source, tmp_path / "ours", quiet, quiet)
    model = json.loads((tmp_path / "ours/checkpoint.json").read_text())["model"]
    training = {"sequence_length": TOKENS, "micro_batch_size": ROWS, "global_batch_size": ROWS}
    state = backend.state({"model": model | WITHOUT_MTP, "training": training})
    checkpoint.load(state, tmp_path / "ours", resume=False, with_optimizer=False)

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, TOKENS + 1), generator=generator)
    tokens = tokens.to(device)
    logits, loss, published = theirs(reference, tokens)
    found_logits, found_loss, found = ours(state, tokens)
    config = state.config.model.model_copy(update={"mtp_num_layers": 0})
    wanted = hf.to_megatron(published, config, gradients=True) | {"logits": logits}
    found["logits"] = found_logits
    if exact:
        allowed = dict.fromkeys(wanted, EXACT)
    else:
        rough_logits, _, rough = theirs(reference.to(torch.bfloat16), tokens)
        rough = hf.to_megatron(rough, config, gradients=True) | {"logits": rough_logits}
        allowed = {
            name: (ROUGH_GATES if name.endswith(GATES) else ROUGH) * distance(rough[name], want)
            for name, want in wanted.items()
        }
    off = {name: distance(found[name], want) for name, want in wanted.items()}
    worst = max(off, key=lambda name: off[name] / allowed[name])
    print(f"loss off by {found_loss - loss:.1e}, {worst} by {off[worst]:.1e} of {allowed[worst]:.1e}")
    assert found_loss == pytest.approx(loss, rel=1e-5 if exact else 2e-3)
    assert [name for name in wanted if off[name] > allowed[name]] == []
