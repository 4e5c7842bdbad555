"""Refused settings of MTP training: one error message before anything is built, with what to do."""

from typing import Any

import pytest

from megatron_q3n.config import UserError, validate

REPEATED = {"mtp_num_layers": 3, "mtp_use_repeated_layer": True}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no layer": ({"model": {"mtp_num_layers": 0}, "stage": "mtp"}, "builds no multi-token prediction layer"),
    "separate layers": (
        {"model": {"mtp_num_layers": 2}, "mtp": {"method": "inference"}},
        "model.mtp_use_repeated_layer=true",
    ),
    "a frozen trunk while pretraining": ({"mtp": {"trunk": "frozen"}}, "mtp.trunk=frozen with stage=pretrain"),
    "a frozen trunk without a checkpoint": ({"stage": "mtp", "mtp": {"trunk": "frozen"}}, "needs a trained trunk"),
    "weights of other depths": (
        {"model": REPEATED, "mtp": {"depth_weights": [1.0, 0.5]}},
        "has 2 entries for model.mtp_num_layers=3",
    ),
    "all weights zero": ({"mtp": {"depth_weights": [0.0]}}, "at least one above 0"),
    "no loss": ({"mtp": {"method": "inference", "label_weight": 0.0}}, "leave no loss"),
    "a setting without effect": ({"mtp": {"distillation_weight": 1.0}}, "no effect with mtp.method=stock"),
    "conversations without a source": ({"stage": "mtp", "sft": {"turns": "last"}}, "sft settings but no sft.train"),
    "conversations in several rows": (
        {"stage": "mtp", "sft": {"train": [{"task": {"name": "chain_sum"}}]}},
        "micro_batch_size must be 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    tree, message = BAD[case]
    with pytest.raises(UserError, match=message):
        validate(tree)


def test_pretraining_can_train_for_drafting() -> None:
    config = validate({"model": REPEATED, "mtp": {"method": "inference", "trunk": "detached"}})
    assert config.stage == "pretrain"
