"""Instruments leave training as it is, are gone between their steps, and read the gradient that the optimizer reads.

One process on a CPU. A captured CUDA graph is not tested: the pass that is looked at is a validation's.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny_state import fingerprint, state_of

STEPS = 4


def batch_of(step: int) -> Any:
    import torch

    from megatron_q3n.data.batch import batch_of_rows

    rows = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(step))
    return batch_of_rows(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(2, 32))


def trained(
    alone: Any, settings: dict[str, Any], watch: Callable[[Any, Any], None] = lambda *_: None
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
        instruments.before_step()
        reports.append(train_step(state, [batch_of(step)]))
        watch(state, reports[-1])
        measured.append(instruments.after_step([batch_of(step)], reports[-1]))
    return state, measured, reports


def test_training_is_the_same_bit_for_bit(alone: Any) -> None:
    state, measured, _ = trained(alone, {"instruments": {"interval_steps": 2}})
    assert [bool(values) for values in measured] == [True, True, False, True]
    plain, nothing, _ = trained(alone, {"instruments": {"interval_steps": 0}})
    assert not any(nothing)
    assert fingerprint(state) == fingerprint(plain)


def test_nothing_listens_between(alone: Any) -> None:
    state, *_ = trained(alone, {"instruments": {"interval_steps": 2}})
    for module in state.models[0].modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert getattr(module, "tape", None) is None


@pytest.mark.parametrize("clip_grad", [0.0, 1e-3])
def test_gradients_by_layer(alone: Any, clip_grad: float) -> None:
    """From the main gradients, which stay as they are where nothing is clipped; clipping must not show either way."""
    wanted: list[dict[str, float]] = []

    def keep(state: Any, _: Any) -> None:
        squares: dict[str, float] = {}
        for name, weight in state.models[0].named_parameters():
            place = {"em": "embedding", "mt": "mtp"}.get(name[:2], "head")
            if name.startswith("decoder.layers."):
                place = f"layer_{int(name.split('.')[2]) // 2}"
            squares[place] = squares.get(place, 0.0) + weight.main_grad.double().square().sum().item()
        wanted.append({f"gradients/norm_{place}": s**0.5 for place, s in squares.items()})

    settings = {"instruments": {"interval_steps": 1}, "optimizer": {"clip_grad": 0.0}}
    trained(alone, settings, keep)
    settings["optimizer"] = {"clip_grad": clip_grad}
    _, measured, reports = trained(alone, settings)
    own = {name: value for name, value in measured[0].items() if name.startswith("gradients/")}
    assert own == pytest.approx(wanted[0], rel=1e-6)
    for values, report in zip(measured, reports):
        squares = sum(v**2 for name, v in values.items() if name.startswith("gradients/"))
        assert squares**0.5 == pytest.approx(report.grad_norm, rel=1e-6)


def test_what_a_look_costs_is_found_by_turns(tmp_path: Path) -> None:
    """The command's figures are those of its own timings; how large they are is a machine's affair."""
    from tests import forked

    settings = ["training.sequence_length=16", "model.mtp_num_layers=0", "model.num_layers=4"]
    options = ["--config-name", "pretrain-tiny", "--looks", "2", "--every", "3"]
    tool = Path(__file__).parents[2] / "tools/benchmarks/instruments_cost.py"
    done = forked.run(tool, *options, "--json", tmp_path / "cost.json", *settings)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cost.json").read_text())
    seconds = {kind: statistics.median(times) for kind, times in found["seconds"].items()}
    assert [len(times) for times in found["seconds"].values()] == [6, 4, 2]
    look = seconds["looked at"] - seconds["without"]
    assert found["more for a look, ms"] == pytest.approx(1000 * look, abs=1e-3)
    share = float(found["share of a run's time"].removesuffix(" %"))
    assert share == pytest.approx(100 * look / (100 * seconds["without"]), abs=0.01)
