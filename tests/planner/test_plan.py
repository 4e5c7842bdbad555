"""Memory planner: small cases by hand, conservation over ranks, measured peaks, and the printed table.

Not covered: overhead of torch's allocator on a GPU.
"""

import io
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from rich.console import Console

from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import embedding_weights, mtp_weights, trunk_weights
from megatron_q3n.planner import Gpu, plan, render
from megatron_q3n.planner.activations import EXPERT_IMBALANCE, gated_attention, mixture_of_experts
from megatron_q3n.planner.plan import GIB
from megatron_q3n.planner.schedule import in_flight
from megatron_q3n.planner.states import expert_replicas
from megatron_q3n.recipe import configure, register_defaults

QWEN3_NEXT_80B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_layers": 48,
    "num_attention_heads": 16,
    "kv_channels": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_moe_experts": 512,
    "moe_router_topk": 10,
    "moe_ffn_hidden_size": 512,
    "moe_shared_expert_intermediate_size": 512,
}
PIPELINE = {"world_size": 4, "pipeline_model_parallel_size": 4}
RECOMPUTE_MODULES = ["core_attn", "moe", "moe_act", "shared_experts", "layernorm", "gated_delta_net"]


# megatron-core recomputes MTP only one sublayer at a time
NO_MTP = {"mtp_num_layers": 0}


def run_config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(sections)


def activations(**sections: Any) -> list[float]:
    """Return the activation bytes of every stage of the tiny model in a pipeline of four."""
    return [stage.activations for stage in plan(run_config(parallel=PIPELINE, **sections)).stages]


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def full(method: str, sublayers: int) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": sublayers}


@pytest.mark.parametrize(
    ("precision", "weights", "gradients", "optimizer"),
    [
        ({"compute": "fp32"}, 4, 4, 8),
        ({"compute": "bf16"}, 2, 4, 12),
        ({"compute": "bf16", "grad_reduce_in_fp32": False}, 2, 2, 16),
    ],
    ids=["fp32", "bf16", "bf16 gradients"],
)
def test_bytes_per_parameter_on_one_rank(
    precision: dict[str, Any], weights: int, gradients: int, optimizer: int
) -> None:
    result = plan(run_config(precision=precision))
    [stage] = result.stages
    count = result.parameters.total_with_mtp
    assert stage.parameters.total == count
    assert stage.states.weights == weights * count
    assert stage.states.gradients == gradients * count
    assert stage.states.optimizer == optimizer * count


def test_fp8_adds_two_copies_of_the_large_matrices() -> None:
    bf16 = plan(run_config(precision={"compute": "bf16"})).stages[0]
    fp8 = plan(run_config(precision={"compute": "bf16", "fp8": "hybrid"})).stages[0]
    qkvz, out = 128 * (64 + 64 + 128 + 128), 128 * 128
    attention = 128 * (128 + 128 + 64 + 64) + 128 * 128
    shared = 3 * 128 * 64
    experts = 8 * 3 * 128 * 64
    matrices = 3 * (qkvz + out) + attention + 4 * (shared + experts) + attention + shared + experts
    assert fp8.states.weights - bf16.states.weights == 2 * matrices
    assert fp8.activations < bf16.activations


def test_distributed_optimizer_shards_dense_and_expert_state_over_their_replicas() -> None:
    """Eight ranks, TP2 × CP2 × DP2 for dense weights, EP4 × 2 replicas for experts."""
    layout = {
        "world_size": 8,
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 4,
    }
    [cut] = plan(run_config(parallel=layout, training={"global_batch_size": 8})).stages
    assert cut.states.optimizer == 8 * (cut.parameters.dense / 4 + cut.parameters.experts / 2)
    assert cut.states.weights == 4 * cut.parameters.total
    assert cut.parameters.experts == 5 * 2 * 3 * 128 * 64  # 4 layers and MTP, 8 experts over 4 ranks


@given(
    tensor=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2, 4]),
    chunks=st.sampled_from([None, 2]),
    expert=st.sampled_from([1, 2, 4, 8]),
    expert_tensor=st.sampled_from([1, 2]),
    depths=st.sampled_from([0, 1, 2]),
)
def test_all_ranks_together_hold_every_tensor_once_per_replica(
    tensor: int, context: int, pipeline: int, chunks: int | None, expert: int, expert_tensor: int, depths: int
) -> None:
    """The only exception is the second copy of the embedding (MTP on another stage than the first)."""
    dense_replicas = 8  # data parallel; a multiple of every expert group below
    world = dense_replicas * tensor * context * pipeline
    assume((world // pipeline) % (expert * expert_tensor) == 0)
    assume(pipeline > 1 or chunks is None)
    config = run_config(
        model={"mtp_num_layers": depths, "num_layers": 8},
        training={"global_batch_size": 128},
        parallel={
            "world_size": world,
            "tensor_model_parallel_size": tensor,
            "context_parallel_size": context,
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": chunks,
            "expert_model_parallel_size": expert,
            "expert_tensor_parallel_size": expert_tensor,
        },
    )
    result = plan(config)
    weights = trunk_weights(config.model) + mtp_weights(config.model)
    if pipeline > 1 and depths:
        weights += embedding_weights(config.model)
    replicas = {
        "tensor": dense_replicas * context,
        "none": dense_replicas * context * tensor,
        "expert": world // (expert * expert_tensor * pipeline),
    }
    parameters = result.ranks_per_stage * sum(stage.parameters.total for stage in result.stages)
    assert parameters == sum(weight.count * replicas[weight.split] for weight in weights)
    assert expert_replicas(config) == replicas["expert"]


def test_moe_activations_by_hand() -> None:
    """Tiny model, 1,024 tokens, fp32; top-2 of 8 experts of width 64, one shared expert of 64."""
    saved = {tensor.name: tensor.bytes for tensor in mixture_of_experts(run_config()).saved}
    copies = 1024 * 2 * (1 + EXPERT_IMBALANCE)
    assert saved == {
        "residual stream": 1024 * 128 * 4,
        "normed": 1024 * 128 * 4,
        "router": 1024 * 8 * 13,
        "tokens": copies * 128 * 4,
        "gate|up": copies * 128 * 4,
        "SiLU, product": copies * 128 * 4,
        "activated": copies * 64 * 4,
        "shared gate|up": 1024 * 128 * 4,
        "shared activated": 1024 * 64 * 4,
        "shared output": 1024 * 128 * 4,
    }


@pytest.mark.parametrize(
    ("gate", "projected", "gated"),
    [
        ({}, 128 + 128 + 128, 128 * 4 + 128 * 4),
        ({"attention_gate": "none"}, 128 + 128, 0),
        ({"attention_gate": "headwise"}, 128 + 4 + 128, 128 * 4 + 4 * 4),
        ({"attention_gate_position": "value"}, 128 + 64 + 128, 64 * 4 + 64 * 4),
        ({"attention_gate_shared": True}, 128 + 32 + 128, 128 * 4 + 32 * 4),
    ],
)
def test_gates_by_hand(gate: dict[str, Any], projected: int, gated: int) -> None:
    """Tiny model, 1,024 tokens, fp32; 4 heads of 32, 2 key/value heads."""
    saved = {t.name: t.bytes for t in gated_attention(run_config(model=gate)).saved}
    assert saved["query|gate|key|value"] == 1024 * projected * 4
    assert saved.get("gate input, sigmoid", 0) == 1024 * gated


@pytest.mark.parametrize("module", RECOMPUTE_MODULES)
def test_each_recompute_module_lowers_the_saved_activations(module: str) -> None:
    before, after = activations(), activations(training=selective(module))
    assert all(less <= more for less, more in zip(after, before))
    assert sum(after) < sum(before)


def test_recompute_settings_are_ordered_by_memory() -> None:
    none, everything = (activations(model=NO_MTP), activations(model=NO_MTP, training=selective(*RECOMPUTE_MODULES)))
    uniform, coarser = (
        activations(model=NO_MTP, training=full("uniform", 1)),
        activations(model=NO_MTP, training=full("uniform", 2)),
    )
    block = activations(model=NO_MTP, training=full("block", 1))
    assert sum(coarser) < sum(uniform) < sum(everything) < sum(none)
    assert sum(uniform) < sum(block) < sum(none)


def test_full_recompute_saves_the_residual_stream_of_every_group() -> None:
    """Two sublayers a stage, eight micro-batches: four of them in flight on the first stage, one less on each next."""
    stream, batch = 1024 * 128 * 4, {"global_batch_size": 32}
    one_group = activations(model=NO_MTP, training={**full("uniform", 2), **batch})
    two_groups = activations(model=NO_MTP, training={**full("uniform", 1), **batch})
    assert one_group[:3] == [4 * stream, 3 * stream, 2 * stream]
    assert two_groups[:3] == [8 * stream, 6 * stream, 4 * stream]


def test_more_ranks_leave_less_on_each() -> None:
    def stage(**parallel: Any) -> Any:
        world = {"world_size": 2, **parallel}
        return plan(run_config(parallel=world, training={"global_batch_size": 8})).stages[0]

    alone = stage()
    for layout in ("tensor_model_parallel_size", "context_parallel_size"):
        cut = stage(**{layout: 2})
        assert cut.activations == pytest.approx(alone.activations / 2)
    experts = stage(expert_model_parallel_size=2)
    assert experts.parameters.experts == alone.parameters.experts / 2
    assert experts.activations == alone.activations  # balanced: as many copies come in as go out


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 1), (4, 1), (2, 2), (4, 2), (4, 3)])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_in_flight_counts_follow_megatron_cores_schedule(ranks: int, chunks: int, groups: int) -> None:
    """megatron-core's own warm-up count and schedule table, for a number of micro-batches its schedule accepts."""
    microbatches = groups * ranks
    order = [chunk for _, chunk in get_schedule_table(microbatches, chunks, ranks)]
    for rank in range(ranks):
        warmup = _megatron_core_warmup(rank, ranks, chunks, microbatches)
        started = order[: warmup + 1]
        expected = [started.count(chunk) for chunk in range(chunks)]
        assert in_flight(rank, ranks, chunks, microbatches) == expected


def _megatron_core_warmup(rank: int, ranks: int, chunks: int, microbatches: int) -> int:
    parallel_state.set_pipeline_model_parallel_world_size(ranks)
    parallel_state.set_pipeline_model_parallel_rank(rank)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks if chunks > 1 else None)
    try:
        return get_pp_rank_microbatches(microbatches, chunks, ranks)[2]
    finally:
        parallel_state.set_pipeline_model_parallel_world_size(None)
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


def test_estimates_are_at_most_ten_percent_above_measured_peaks() -> None:
    """One H200: pretrain-small 9.97 GiB; a period of the 80B's width, between 8 layers and 4, 19.12 GiB."""
    register_defaults()
    small = plan(configure(["--config-name", "pretrain-small"])).stages[0]
    assert 9.97 <= small.total / GIB <= 1.1 * 9.97

    def without_optimizer(layers: int) -> float:
        [stage] = plan(
            run_config(
                model={**QWEN3_NEXT_80B, "num_layers": layers, "num_moe_experts": 128, **NO_MTP},
                precision={"compute": "bf16"},
                training={"sequence_length": 4096, "micro_batch_size": 4, "global_batch_size": 4},
            )
        ).stages
        return (stage.states.weights + stage.states.gradients + stage.activations) / GIB

    period = without_optimizer(8) - without_optimizer(4)
    assert 19.12 <= period <= 1.1 * 19.12


def test_verdict_depends_on_the_gpu() -> None:
    config = run_config(model=QWEN3_NEXT_80B)
    assert not plan(config).fits
    needed = plan(config).largest.total / GIB
    assert plan(config, Gpu("just enough", needed + 4.5)).fits
    assert not plan(config, Gpu("just too small", needed + 3.5)).fits


@pytest.mark.parametrize("width", [80, 160])
def test_table_names_the_largest_stage_and_fits_the_terminal(width: int) -> None:
    layout = {
        "world_size": 32,
        "pipeline_model_parallel_size": 8,
        "virtual_pipeline_model_parallel_size": 4,
        "expert_model_parallel_size": 4,
    }
    training = {"global_batch_size": 256, "sequence_length": 4096, **selective("moe")}
    result = plan(run_config(model=QWEN3_NEXT_80B, parallel=layout, training=training))
    text = _rendered(result, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text, "a cell was cut off"
    flowing = " ".join(text.split())
    assert f"stage {result.largest.rank}, needs {result.largest.total / GIB:.1f} GiB" in flowing
    assert "does NOT fit" in flowing
    assert "79.67 B + 1.65 B MTP" in flowing


def test_groups_that_cross_nodes_are_reported() -> None:
    def placement(**parallel: Any) -> str:
        training = {"global_batch_size": 64}
        config = run_config(parallel={"world_size": 16, **parallel}, training=training)
        return " ".join(_rendered(plan(config), 160).split())

    assert "TP, CP and EP groups stay inside a node" in placement(expert_model_parallel_size=8)
    assert "EP groups cross nodes" in placement(expert_model_parallel_size=8, gpus_per_node=4)
    assert "placement" not in " ".join(_rendered(plan(run_config()), 160).split())


def test_planner_does_not_import_torch() -> None:
    program = (
        "import sys; from megatron_q3n.config import RunConfig; from megatron_q3n.planner import plan; "
        "plan(RunConfig()); print(sorted({'torch', 'megatron', 'omegaconf', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dry_run_of_the_train_module_writes_nothing(run_module: Any, tmp_path: Any) -> None:
    done = run_module("--config-name", "pretrain-80b_a3b", "dry_run=true")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "it fits H100 80 GB" in shown
    assert f"refused: data.train.0.path={tmp_path}/corpora/train does not exist. Create it with tools/prep" in shown
    assert list(tmp_path.iterdir()) == []


def test_fp8_does_not_fit_a_machine_without_a_gpu() -> None:
    settings = {"precision": {"compute": "bf16", "fp8": "hybrid"}, "model": {"moe_ffn_hidden_size": 64}}
    shown = " ".join(_rendered(plan(RunConfig.model_validate(settings)), 200).split())
    assert "A machine without a GPU cannot run it: precision.fp8=hybrid." in shown
    assert "that fits" not in shown


def _rendered(result: Any, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined]
