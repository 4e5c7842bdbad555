"""Speed comparison of tools/benchmarks/bench.py: shapes, refusals, arithmetic, tables, and comparisons on a CPU.

Not covered: stock megatron-core beyond its configuration, since its Gated DeltaNet needs a GPU; correctness of figures
measured on a GPU.
"""

import dataclasses
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.sizes import flops_per_token, parameters
from megatron_q3n.recipe import register_defaults

ROOT = Path(__file__).parents[2]
TINY = ("--config-name", "pretrain-tiny", "--precision", "fp32", "--vocabulary", "512")
SHORT = ("--sequence-length", "64", "--iterations", "2", "--warmup", "1")


def module(name: str) -> Any:
    """Import a module of tools/benchmarks by its name there."""
    return importlib.import_module(f"tools.benchmarks.{name}")


def config_of(periods: int = 1, kind: str = "ours", **case: Any) -> RunConfig:
    register_defaults()
    cases = module("comparison.cases")
    setting = cases.Setting("pretrain-tiny", "balanced", 512)
    shape = cases.Case(**{"experts": None, "sequence_length": 64, "tokens": 128, **case})
    return cases.config_of(setting, shape, cases.Contestant(kind, "fp32"), periods)


def test_a_case_becomes_a_configuration() -> None:
    config = config_of(2, experts=16)
    assert config.model.num_layers == 8
    assert config.model.num_moe_experts == 16
    assert (config.training.micro_batch_size, config.training.sequence_length) == (2, 64)
    assert config.model.megatron == {"moe_router_force_load_balancing": True}
    assert (config.model.mtp_num_layers, config.model.moe_aux_loss_coeff) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["period", "--contestants", "ours,theirs"], "--contestants theirs: no such contestant"),
        (["period", "--contestants", "ours,ours"], "named twice"),
        (["period", "--contestants", "ours:fp9"], "there is no recipes/precision/fp9.yaml"),
        (["period", "--contestants", "transformers:fp8_tensorwise"], "does not train in FP8"),
        (["period", "--tokens", "5000"], "a micro-batch is whole sequences"),
        (["period", "--experts", "many"], "give positive whole numbers"),
        (["period", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["period", "--stock", "moe_router_fusion"], "give FIELD=VALUE"),
        (["period", "model.hidden_sise=3"], "model.hidden_sise: no such setting"),
        (["gdn", "--contestants", "ours:fp8_tensorwise"], "outside the model's FP8 context"),
        (["steps", "--config-name", "pretrain-tiny", "--steps", "0"], "--steps must be at least 1"),
        (["start", "--config-name", "pretrain-nano"], "no such recipe"),
    ],
)
def test_bad_arguments_are_refused_before_a_process_starts(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/benchmarks/bench.py", *arguments])
    assert module("bench").main() == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "GEMM dense"),
        ("void cutlass::device_kernel<GemmUniversal<GroupProblemShape<int>>>", "GEMM grouped"),
        ("main_kernel", "GDN"),
        ("causal_conv1d_bwd_kernel", "GDN"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("_permute_kernel", "permute/router"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp>", "reductions"),
        ("rmsnorm_bwd_tuned_kernel", "norm/elementwise"),
        ("multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        ("an_unknown_name", "other"),
    ],
)
def test_kernels_are_grouped_by_name(name: str, group: str) -> None:
    assert module("comparison.kernel_groups").group_of(name) == group


def test_busy_time_counts_overlapping_kernels_once() -> None:
    groups = module("comparison.kernel_groups")
    spans = [groups.Span("a_gemm", 0, 10), groups.Span("copy", 5, 10), groups.Span("copy", 30, 4)]
    found = groups.summarized(spans, launches=6, steps=2)
    assert found.busy_ms == pytest.approx((15 + 4) / 1000 / 2)
    assert found.groups_ms["copies"] == pytest.approx(14 / 1000 / 2)
    assert (found.kernels, found.launches) == (1.5, 3)


def measured() -> tuple[list[Any], Any, Any]:
    """Return measurements of two contestants in one case: 1 and 3 ms a step, and 2 and 6 ms."""
    cases, interleaving, worker = (module(f"comparison.{n}") for n in ("cases", "interleaving", "worker"))
    groups = module("comparison.kernel_groups")
    case, entries, configurations = cases.Case(None, 64, 128), [], {}
    for speed, kind in ((1, "ours"), (2, "transformers")):
        contestant = cases.Contestant(kind, "fp32")
        entry = interleaving.ContestantProcess(contestant, SimpleNamespace(), SimpleNamespace(), Path())
        for periods in cases.PERIODS:
            config = config_of(periods, kind)
            configurations[case, contestant, periods] = config
            ms = speed * (1 if periods == 1 else 3)
            measurement = worker.Measurement(
                seconds=[ms / 1000] * 3,
                wall_seconds=ms / 1000,
                parameters=parameters(config.model).total,
                peak_allocated_gib=periods,
                profile=groups.Profile({"GEMM dense": ms / 2}, ms / 2, 100 * periods, periods),
            )
            entry.measurements[case, periods] = [measurement, dataclasses.replace(measurement)]
        entries.append(entry)
    options = interleaving.Options("step", 2, 3, 1, 2, {}, "bf16")
    return entries, configurations, options


def test_quantizing_weights_is_reported_beside_the_period() -> None:
    """A separate figure, and the sum; neither where it happens within the steps."""
    entries, configurations, options = measured()
    for (_, periods), measurements in entries[0].measurements.items():
        for measurement in measurements:
            measurement.quantize_seconds = 0.0004 * periods
    first, second = module("comparison.findings").rows_of(entries, configurations, options, None)
    assert first["renewing_milliseconds"] == pytest.approx(0.4)
    assert first["milliseconds_and_renewing"] == pytest.approx(first["milliseconds"] + 0.4)
    assert "renewing_milliseconds" not in second
    shown = io.StringIO()
    module("comparison.tables").show_comparison([first, second], Console(file=shown, width=170))
    assert "weights ms: quantizing" in shown.getvalue()


def test_a_period_is_the_difference_of_two_models() -> None:
    entries, configurations, options = measured()
    findings = module("comparison.findings")
    ours, theirs = findings.rows_of(entries, configurations, options, flops=1e12)
    assert ours["milliseconds"] == pytest.approx(2)
    assert ours["tokens_per_second"] == pytest.approx(128 / 0.002)
    assert theirs["first_is_times_faster"] == pytest.approx(2)
    assert (ours["peak_gib"], ours["period_gib"]) == (2, 1)
    assert (ours["busy_ms"], ours["gap_ms"]) == (pytest.approx(1), pytest.approx(1))
    assert (ours["kernels"], ours["launches"]) == (100, 1)
    one, two = (flops_per_token(config_of(p).model, 64).total for p in (1, 2))
    assert ours["tflops_per_second"] == pytest.approx((two - one) * 128 / 0.002 / 1e12)
    assert ours["mfu"] == pytest.approx((two - one) * 128 / 0.002 / 1e12)
    assert findings.disagreements([ours, theirs]) == []
    case = next(iter(configurations))[0]
    entries[1].measurements[case, 2][0].parameters += 1
    rows = findings.rows_of(entries, configurations, options, flops=None)
    assert "a period of transformers:fp32 has" in findings.disagreements(rows)[0]


@pytest.mark.parametrize(
    ("one_ms", "two_ms", "flops", "is_doubtful"),
    [
        (64.4, 127.8, 1e15, False),
        # measured of a contestant that waits for its host
        (176.9, 219.2, 1e15, True),
        # a period longer than a model of one
        (122.2, 269.5, 1e15, True),
        (64.4, 60.0, 1e15, True),
        # faster than the device
        (64.4, 127.8, 1.0, True),
    ],
)
def test_a_difference_that_cannot_be_a_period_is_marked_as_doubtful(
    one_ms: float, two_ms: float, flops: float, is_doubtful: bool
) -> None:
    entries, configurations, options = measured()
    for (_, periods), measurements in entries[0].measurements.items():
        for measurement in measurements:
            measurement.seconds = [(one_ms if periods == 1 else two_ms) / 1000] * 3
    row = module("comparison.findings").rows_of(entries, configurations, options, flops)[0]
    assert bool(row["doubt"]) == is_doubtful, row["doubt"]
    shown = io.StringIO()
    module("comparison.tables").show_comparison([row], Console(file=shown, width=90))
    assert ("DOUBTFUL" in shown.getvalue()) == is_doubtful
    if is_doubtful:
        assert f"{two_ms / 2:,.1f} ms at most" in " ".join(shown.getvalue().split())


def test_one_gated_delta_net_layer_is_a_third_of_a_period_s() -> None:
    model = config_of().model
    whole, attention = (flops_per_token(model, 64), model.model_copy(update={"mixer_pattern": "*", "num_layers": 1}))
    expected = whole.delta_rule + whole.projections - flops_per_token(attention, 64).projections
    assert 3 * module("comparison.findings").gated_delta_net_flops(model) == pytest.approx(expected)


@pytest.mark.parametrize("width", [60, 200])
def test_a_table_fits_its_terminal(width: int) -> None:
    entries, configurations, options = measured()
    entries[1].measurements.clear()
    entries[1].failure = "ended with status 1\n[rank0] no such kernel"
    rows = module("comparison.findings").rows_of(entries, configurations, options, 1e12)
    console = Console(width=width, file=io.StringIO(), highlight=False)
    module("comparison.tables").show_comparison(rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    for word in ("ours:fp32", "2.00", "64,000", "[rank0] no such kernel", "GEMM dense"):
        assert word in text


def test_stock_is_configured_with_fields_that_megatron_core_has(alone: Any) -> None:
    """Its fusions need TransformerEngine, so they are disabled here; their names are checked."""
    stock = module("comparison.stock")
    from megatron.core.transformer import TransformerConfig  # late: imported after the device is chosen

    fields = stock.stock_fields(config_of(kind="stock"))
    fusions = {name: False for name, value in fields.items() if "fusion" in name and value is True}
    assert set(fusions) >= {"moe_permute_fusion", "moe_router_fusion", "apply_rope_fusion"}
    built = TransformerConfig(**{**fields, **fusions, "cross_entropy_fusion_impl": "native"})
    assert built.experimental_attention_variant == "gated_delta_net"
    assert built.linear_attention_freq == 4
    config = config_of(kind="stock")
    model = config.model.model_copy(update={"mixer_pattern": "G*G*"})
    config = config.model_copy(update={"model": model})
    with pytest.raises(UserError, match="one attention layer at each period's end"):
        stock.stock_fields(config)


@pytest.mark.parametrize("gradients", ["bf16", "fp32"])
def test_transformers_is_the_same_model(gradients: str) -> None:
    """Its parameters of a period are those of the formula, and balanced routing still gives the router gradients."""
    import torch  # late: most tests here do not need it

    worker = module("comparison.worker")
    device = worker._plain_device(importlib.import_module("megatron_q3n.device"))
    contestant = module("comparison.huggingface").HuggingFace(device, config_of(), gradients)
    counts = []
    for periods in (1, 2):
        contestant.build(config_of(periods, "transformers"))
        counts.append(contestant.parameters())
    formula = [parameters(config_of(periods).model).total for periods in (1, 2)]
    assert counts[1] - counts[0] == formula[1] - formula[0]
    contestant.step()
    routers = [p for n, p in contestant.model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert len(routers) == 8
    if gradients == "fp32":
        assert all(p.grad is None for p in routers)
        assert all(g.dtype == torch.float32 and g.any() for g in contestant.main_gradients)
    else:
        assert all(p.grad is not None and p.grad.any() for p in routers)
    assert len(contestant.mixers()) == 6


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/benchmarks/bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_a_comparison_of_the_tiny_model(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("period", *TINY, *SHORT, "--contestants", "ours,transformers", "--profile", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all contestants agree on a period's parameters" in done.stdout
    ours, theirs = json.loads(file.read_text())["rows"]
    assert (ours["contestant"], theirs["contestant"]) == ("ours:fp32", "transformers:fp32")
    assert ours["parameters"] == ours["parameters_by_formula"] == theirs["parameters"]
    assert ours["samples"] == 4
    # two periods less one: on a busy CPU the difference of a group's times may be of either sign
    assert ours["groups_ms"]["GEMM dense"] != 0


@pytest.mark.slow
def test_gated_delta_net_alone(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("gdn", *TINY, *SHORT, "--contestants", "ours", "--rounds", "1", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert row["tokens_per_second"] == pytest.approx(64_000 / row["milliseconds"])


@pytest.mark.slow
def test_stock_is_refused_without_a_gpu() -> None:
    done = run("period", *TINY, *SHORT, "--contestants", "stock")
    assert done.returncode == 2
    assert "needs a GPU, TransformerEngine and FLA" in done.stderr


@pytest.mark.slow
def test_steps_without_naming_the_mode_and_a_cold_and_a_warm_start(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    recipe = ("--config-name", "pretrain-tiny", "training.sequence_length=64")
    done = run(*recipe, "--steps", "1", "--warmup", "1", "--profile", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert figures["groups_ms"]["optimizer"] > 0
    phases = sum(figures["phases_seconds"].values())
    assert phases == pytest.approx(figures["time_to_first_step"], rel=0.05)
    done = run("start", *recipe, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert figures["cold_seconds"] > 0
    assert figures["warm_phases_1"]["first step"] > 0
