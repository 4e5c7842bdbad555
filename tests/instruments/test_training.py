"""Instruments do not change training, leave no hooks between their steps, and read the gradient the optimizer reads.

One process on a CPU. A captured CUDA graph is not tested: the measured pass is a validation pass.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.checkpoint.tiny_state import fingerprint, state_of

STEPS = 4


def batch_of(step: int) -> Any:
    import torch

    from megatron_q3n.data.batch import causal_batch

    rows = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(step))
    return causal_batch(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(2, 32))


def trained(
    alone: Any, settings: dict[str, Any], after_step: Callable[[Any, Any], None] = lambda *_: None
) -> tuple[Any, list[dict[str, float]], list[Any]]:
    """Take some steps as the loop does; return the state, what was measured and the steps' reports."""
    from megatron_q3n import parallel
    from megatron_q3n.instruments import Instruments
    from megatron_q3n.training.step import train_step

    parallel.seed(1)
    state = state_of(alone, settings)
    instruments = Instruments(state)
    measured, reports = [], []
    for step in range(STEPS):
        instruments.before_step(step + 1)
        reports.append(train_step(state, [batch_of(step)]))
        after_step(state, reports[-1])
        measured.append(instruments.measure(reports[-1]))
    return state, measured, reports


def test_training_is_the_same_bit_for_bit(alone: Any) -> None:
    state, measured, _ = trained(alone, {"instruments": {"interval_steps": 2}})
    assert [bool(values) for values in measured] == [True, True, False, True]
    plain, nothing, _ = trained(alone, {"instruments": {"interval_steps": 0}})
    assert not any(nothing)
    assert fingerprint(state) == fingerprint(plain)


def test_no_hook_is_left_between_measurements(alone: Any) -> None:
    state, *_ = trained(alone, {"instruments": {"interval_steps": 2}})
    for module in state.models[0].modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert not state.models[0].config.pass_state.is_observed


@pytest.mark.parametrize("clip_grad", [0.0, 1e-3])
def test_gradients_by_layer(alone: Any, clip_grad: float) -> None:
    """From the main gradients, which stay as they are where nothing is clipped; clipping must not show either way."""
    expected: list[dict[str, float]] = []

    def record(state: Any, _: Any) -> None:
        squares: dict[str, float] = {}
        for name, weight in state.models[0].named_parameters():
            place = {"em": "embedding", "mt": "mtp"}.get(name[:2], "head")
            if name.startswith("decoder.layers."):
                place = f"layer_{int(name.split('.')[2]) // 2}"
            squares[place] = squares.get(place, 0.0) + weight.main_grad.double().square().sum().item()
        expected.append({f"gradients/norm_{place}": s**0.5 for place, s in squares.items()})

    settings = {"instruments": {"interval_steps": 1}, "optimizer": {"clip_grad": 0.0}}
    trained(alone, settings, record)
    settings["optimizer"] = {"clip_grad": clip_grad}
    _, measured, reports = trained(alone, settings)
    own = {name: value for name, value in measured[0].items() if name.startswith("gradients/")}
    assert own == pytest.approx(expected[0], rel=1e-6)
    for values, report in zip(measured, reports):
        squares = sum(v**2 for name, v in values.items() if name.startswith("gradients/"))
        assert squares**0.5 == pytest.approx(report.grad_norm, rel=1e-6)


def test_the_cost_of_a_measurement_is_computed_from_alternating_steps(tmp_path: Path) -> None:
    """The command's figures follow from its timings. Their size depends on the machine and is not tested."""
    from tests import forked

    settings = ["training.sequence_length=16", "model.mtp_num_layers=0", "model.num_layers=4"]
    options = ["--config-name", "pretrain-tiny", "--measurements", "2", "--every", "3"]
    tool = Path(__file__).parents[2] / "tools/benchmarks/instruments_cost.py"
    done = forked.run(tool, *options, "--json", tmp_path / "cost.json", *settings)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cost.json").read_text())
    seconds = {kind: statistics.median(times) for kind, times in found["seconds"].items()}
    assert [len(times) for times in found["seconds"].values()] == [6, 4, 2]
    extra = seconds["measured"] - seconds["without"]
    assert found["more for a measured step, ms"] == pytest.approx(1000 * extra, abs=1e-3)
    share = float(found["share of a run's time"].removesuffix(" %"))
    assert share == pytest.approx(100 * extra / (100 * seconds["without"]), abs=0.01)


@pytest.mark.parametrize(
    ("rows", "replicas", "interleaved", "expected"),
    [(4, 1, False, 2), (4, 2, False, 1), (5, 2, False, 2), (1, 4, False, 1), (2, 1, True, 2), (100, 2, False, 6)],
)
def test_rows_are_whole_microbatches_of_all_replicas(
    rows: int, replicas: int, interleaved: bool, expected: int
) -> None:
    """Micro-batches of 2 rows, 6 of each replica; with interleaved pipeline stages, 2 of them."""
    from megatron_q3n.instruments import Instruments

    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2} if interleaved else {}
    config = SimpleNamespace(
        instruments=SimpleNamespace(interval_steps=0, global_rows=rows),
        model=SimpleNamespace(num_layers=4),
        training=SimpleNamespace(micro_batch_size=2),
        parallel=SimpleNamespace(**({"virtual_pipeline_model_parallel_size": None} | layout)),
    )
    state = SimpleNamespace(config=config, parallel=SimpleNamespace(data_size=replicas))
    assert Instruments(state)._measured_part([*range(6)]) == [*range(expected)]
