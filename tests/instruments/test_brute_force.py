"""Every metric of the instruments against a brute-force computation in the reference model, in fp64.

The reference (model/reference/model.py) shares no code with the model that is measured; here its attention and delta
rule are wrapped, and everything is computed from whole softmax matrices, states token by token, and plain means. One
process; parallel layouts: tests/tools/layouts. GPUs are not covered.
"""

import math
import statistics
from typing import Any

import pytest
import torch

from megatron_q3n import hf
from megatron_q3n.config import validate
from megatron_q3n.metrics import names
from megatron_q3n.model.reference import layers as reference_layers
from tests.model.reference.test_model import move_from_init, reference

ROWS, TOKENS = 3, 70  # not a multiple of the chunk
SETTINGS: dict[str, Any] = {
    "model": {"hidden_size": 32, "vocab_size": 64, "num_layers": 4, "mixer_pattern": "G*G*"},
    "data": {"source": "blend", "train": [{"path": "unused"}]},
    "training": {"sequence_length": TOKENS, "steps": 100, "micro_batch_size": ROWS, "global_batch_size": ROWS},
    "instruments": {"interval_steps": 5},
}


def some_batch() -> Any:
    from megatron_q3n.data.batch import causal_batch

    tokens = torch.randint(0, 64, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(3))
    return causal_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(ROWS, TOKENS))


class BruteForce:
    """One run of the reference model, with the inputs of its parts recorded."""

    def __init__(self, exact: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shares: list[float] = []
        self.half_lives: list[list[float]] = []
        self.state_norms: list[float] = []
        self.residual: list[torch.Tensor] = []
        attend, delta = reference_layers.causal_attention, reference_layers.gated_delta_rule
        monkeypatch.setattr(
            reference_layers,
            "causal_attention",
            lambda q, k, v, window=None: (self._attention(q, k), attend(q, k, v, window))[1],
        )
        monkeypatch.setattr(reference_layers, "gated_delta_rule", lambda *x: (self._delta(*x), delta(*x))[1])
        for layer in (*exact.model.layers, *exact.mtp.layers):
            layer.register_forward_hook(lambda _, __, output: self.residual.append(output[0]))
        with torch.no_grad():
            probs = exact(batch.tokens_BT).router_probs
        # behind the trunk's layers MTP's
        self.entropies = [(-(p * p.log()).sum(-1).mean() / math.log(p.shape[-1])).item() for p in probs]

    def _attention(self, query: torch.Tensor, key: torch.Tensor) -> None:
        key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) / math.sqrt(query.shape[-1])
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        self.shares.append(weights[:, :, 1:, 0].mean().item())

    def _delta(self, _: Any, key: Any, value: Any, decay: Any, beta: Any) -> None:
        state = key.new_zeros(ROWS, key.shape[2], key.shape[3], value.shape[3])
        for t in range(TOKENS):
            k = key[:, t, :, :, None]
            forget = torch.eye(key.shape[3], dtype=key.dtype) - beta[:, t, :, None, None] * k @ k.mT
            write = beta[:, t, :, None, None] * k @ value[:, t, :, None, :]
            state = decay[:, t, :, None, None].exp() * (forget @ state) + write
        self.state_norms.append(state.square().sum((-2, -1)).sqrt().mean().item())
        self.half_lives.append((math.log(0.5) / decay.mean((0, 1))).tolist())


@pytest.fixture
def measured(alone: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The reference's numbers, and those of a model with the same weights."""
    from megatron_q3n.instruments import Instruments
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import StepReport

    config = validate(SETTINGS)
    exact = reference(config.model)
    move_from_init(exact)
    state = build_state(config, *alone)
    weights = hf.to_megatron(exact.state_dict(), config.model)
    state.models[0].load_state_dict(weights, strict=False)
    instruments, batch = Instruments(state), some_batch()
    state.step = 5
    loads = {"layer 1": [0.5, 0.5, 0.0, 0.0], "mtp": [0.25] * 4}
    values = instruments.measure(StepReport(1.0, 1.0, 1.0, [], {}, loads, [batch]))
    return exact, BruteForce(exact, batch, monkeypatch), values


def test_every_number(measured: Any) -> None:
    """fp32 against fp64: within 1e-4, relative."""
    _, brute, values = measured
    near = lambda expected: pytest.approx(expected, rel=1e-4)
    for place, share in zip(("layer_1", "layer_3", "mtp"), brute.shares, strict=True):
        assert values[f"attention/first_token_share_{place}"] == near(share)
    assert values["attention/first_token_share"] == near(statistics.fmean(brute.shares[:2])), "without MTP"
    assert values["attention/first_token_share_max"] == near(max(brute.shares[:2]))
    places = [*(f"layer_{layer}" for layer in range(4)), "mtp"]
    for place, hidden, entropy in zip(places, brute.residual, brute.entropies, strict=True):
        size = hidden.abs()
        median = size.median(-1).values.mean().item()
        assert values[f"activations/max_{place}"] == near(size.max().item())
        over = size.max().item() / median
        assert values[f"activations/max_over_median_{place}"] == near(over)
        root = size.square().mean().sqrt().item()
        assert values[f"activations/rms_{place}"] == near(root)
        assert values[f"router/entropy_{place}"] == near(entropy)
    assert values["activations/max"] == near(max(h.abs().max().item() for h in brute.residual[:4]))
    assert values["router/entropy_min"] == near(min(brute.entropies[:4]))
    for layer, lives, norm in zip((0, 2), brute.half_lives, brute.state_norms, strict=True):
        assert values[f"gated_delta/half_life_tokens_layer_{layer}"] == near(statistics.median(lives))
        assert values[f"gated_delta/state_norm_layer_{layer}"] == near(norm)
    heads = [life for lives in brute.half_lives for life in lives]
    assert values["gated_delta/half_life_tokens_min"] == near(min(heads))
    assert values["gated_delta/half_life_tokens_max"] == near(max(heads))


def test_norm_scales(measured: Any) -> None:
    exact, _, values = measured
    scales = {name: (1 + w).abs().max().item() for name, w in exact.named_parameters() if "norm" in name}
    gated = {name: weight.abs().max().item() for name, weight in exact.named_parameters() if "linear_attn.norm" in name}
    scales |= gated  # the published ones of these are not zero-centered
    assert values["norm_scale/max"] == pytest.approx(max(scales.values()))
    assert values["norm_scale/max_delta_output"] == pytest.approx(max(gated.values()))
    for layer in range(4):
        own = [s for name, s in scales.items() if f"model.layers.{layer}." in name]
        assert values[f"norm_scale/max_layer_{layer}"] == pytest.approx(max(own))
    assert values["norm_scale/max_query"] == pytest.approx(
        max(s for name, s in scales.items() if "q_norm" in name and not name.startswith("mtp"))
    )


def test_loads_and_names(measured: Any) -> None:
    *_, values = measured
    assert values["experts/load_imbalance_layer_1"] == 2
    assert values["experts/dead_layer_1"] == 2
    assert values["experts/load_imbalance_mtp"] == 1
    for name in values:
        names.check(name)
