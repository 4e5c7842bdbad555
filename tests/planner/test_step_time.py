"""Predicted step times against those of one H200 (tools/benchmarks/LOG.md), and where there is no prediction."""

from typing import Any

import pytest

from megatron_q3n.config import RunConfig, validate
from megatron_q3n.planner.plan import plan
from megatron_q3n.planner.step_time import StepTime, predict

WIDTH = {
    "hidden_size": 2048,
    "vocab_size": 8192,
    "num_attention_heads": 16,
    "num_query_groups": 2,
    "kv_channels": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "moe_router_topk": 10,
    "moe_ffn_hidden_size": 512,
    "moe_shared_expert_intermediate_size": 512,
    "mtp_num_layers": 0,
}


def config_of(layers: int, experts: int, micro: int, rows: int, **sections: Any) -> RunConfig:
    training = {"sequence_length": 4096, "micro_batch_size": micro, "global_batch_size": rows}
    model = WIDTH | {"num_layers": layers, "num_moe_experts": experts}
    return validate({"model": model, "training": training, "precision": {"compute": "bf16"}, **sections})


def predicted(config: RunConfig) -> StepTime:
    return predict(config, plan(config).largest.parameters)


@pytest.mark.parametrize(
    ("layers", "experts", "micro", "rows", "measured_ms"), [(12, 64, 1, 8, 517.3), (4, 128, 4, 4, 92.8)]
)
def test_is_within_15_percent_of_what_was_measured(
    layers: int, experts: int, micro: int, rows: int, measured_ms: float
) -> None:
    time = predicted(config_of(layers, experts, micro, rows))
    assert time.seconds is not None
    assert 1000 * time.seconds == pytest.approx(measured_ms, rel=0.15)


def test_the_exchange_costs_time_and_halves_the_experts() -> None:
    alone = predicted(config_of(12, 64, 1, 8))
    ranks = {"world_size": 2, "expert_model_parallel_size": 2}
    shared = predicted(config_of(12, 128, 1, 16, parallel=ranks))
    assert alone.seconds is not None
    assert shared.seconds is not None
    # 64 experts a rank in both; pulled: 4 × 2,048 × 2 bytes × 12 layers of 32,768 tokens at 335 GB/s, 1.1 × sustained
    exchanged = 1.1 * 4 * 2048 * 2 * 12 * 8 * 4096 / 335e9 * (1 - 0.5**10)
    assert shared.seconds - alone.seconds == pytest.approx(exchanged, rel=0.1)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"training": {"cuda_graph": False, "sequence_length": 4096}}, "without a CUDA graph"),
        ({"model": {}}, "hidden_size below"),
        (
            {"precision": {"compute": "bf16", "fp8": "hybrid"}, "model": WIDTH | {"num_moe_experts": 16}},
            "no rates for FP8",
        ),
    ],
)
def test_says_why_there_is_no_prediction(sections: dict[str, Any], reason: str) -> None:
    time = predicted(validate({"precision": {"compute": "bf16"}, **sections}))
    assert time.seconds is time.mfu is None
    assert reason in (time.reason or "")
