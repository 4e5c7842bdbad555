"""Initial time steps of Gated DeltaNet's heads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_q3n.config import UserError, validate

RANGE = (0.001, 0.1)


def steps_of(model: torch.nn.Module) -> torch.Tensor:
    """Return softplus(dt_bias) of all heads."""
    biases = [p for name, p in model.named_parameters() if name.endswith("dt_bias")]
    assert biases
    return F.softplus(torch.cat(biases).detach())


def test_time_steps_are_spread_over_the_range(alone: Any) -> None:
    """Log-uniform: inside the range, on both sides of its geometric mean. The default is that of the released code."""
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.reference.model import ReferenceModel

    for step_range in (None, RANGE):
        config = validate({"model": {"num_layers": 8, "linear_time_step_init": step_range}})
        (model,) = build_model(config, "torch", alone[1].groups)
        for steps in (steps_of(model), steps_of(ReferenceModel(config.model).init_weights(0))):
            if step_range is None:
                assert steps.allclose(F.softplus(torch.ones(())))
                continue
            assert RANGE[0] * 0.999 <= steps.min() < 0.005
            assert 0.02 < steps.max() <= RANGE[1] * 1.001
            assert 0.3 < (steps < 0.01).float().mean() < 0.7


@pytest.mark.parametrize("step_range", [(0.0, 0.1), (0.1, 0.01)])
def test_an_invalid_range_is_refused(step_range: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"linear_time_step_init.*smaller one first"):
        validate({"model": {"linear_time_step_init": step_range}})
