"""Impossible layouts: refused before anything starts, with the wrong number and divisor in the message.

Configuration only, without torch. Layouts that train: test_layouts.py.
"""

from typing import Any

import pytest

from megatron_q3n.config import UserError, validate
from tests import forked

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tensor_model_parallel_size": 4}, r"num_query_groups=2 .*\.tensor_model_parallel_size=4"),
    ({"pipeline_model_parallel_size": 3}, r"world size=8 .*\.pipeline_model_parallel_size=3"),
    ({"expert_model_parallel_size": 3}, r"num_moe_experts=8 .*\.expert_model_parallel_size=3"),
    ({"expert_tensor_parallel_size": 3}, r"moe_ffn_hidden_size=64 .*\.expert_tensor_parallel_size=3"),
    ({"context_parallel_size": 8}, r"linear_num_key_heads=4 .*\.context_parallel_size=8"),
    (
        {"tensor_model_parallel_size": 2, "sequence_parallel": False},
        "MoE under tensor parallelism only with sequence parallelism",
    ),
    ({"virtual_pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size of 2 or more"),
    ({"pipeline_model_parallel_size": 8}, "some stage would hold no experts"),
    (
        {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
        r"8 pipeline stages .*=4 × virtual 2\) for model.num_layers=4",
    ),
    ({"overlap_param_gather": True}, "overlap_param_gather needs parallel.overlap_grad_reduce"),
    (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        "1 micro-batches per step are not divisible by parallel.pipeline_model_parallel_size=2",
    ),
    ({"expert_model_parallel_size": 8, "expert_tensor_parallel_size": 2}, r"world size=8 .*= 16"),
]


@pytest.mark.parametrize(("layout", "message"), REFUSED)
def test_impossible_layout_is_refused_by_name(layout: dict[str, Any], message: str) -> None:
    training = {"micro_batch_size": 4, "global_batch_size": 16}
    with pytest.raises(UserError, match=message):
        validate({"parallel": {"world_size": 8, **layout}, "training": training})


def test_state_passing_lifts_the_limit_of_heads() -> None:
    layout = {"world_size": 8, "context_parallel_size": 8, "linear_context_parallel": "state_passing"}
    assert validate({"parallel": layout}).parallel.context_parallel_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tp2", "--steps", "0"], "'0' is not a whole number above 0"),
        (["tp2", "--processes", "0"], "'0' is not a whole number above 0"),
        (["tp2", "--processes", "-1"], "'-1' is not a whole number above 0"),
        (["tp2", "--masked", "1.5"], "a share from 0 to below 1"),
        (["tp2", "--masked", "nan"], "a share from 0 to below 1"),
        (["--reshard", "tp2:pp2", "--steps", "1"], "needs --steps 2 or more"),
    ],
)
def test_an_impossible_number_is_refused(arguments: list[str], message: str) -> None:
    done = forked.run(forked.ROOT / "tools/checks/check_layout.py", *arguments)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
