"""More parallel layouts, in the error-prone cases: packed documents, products of three dimensions, other models.

Slow because of their number; each list is one run of the layout check.
"""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

# half of the anchors feed their own drafts, and only correct ones, so that any different draft is detected
DRAFTS = [
    "model.mtp_num_layers=3",
    "model.mtp_use_repeated_layer=true",
    "mtp.method=inference",
    "mtp.scheduled_sampling_start=0.5",
    "mtp.scheduled_sampling_end=0.5",
    "mtp.distillation_weight=0.5",
    "mtp.depth_weights=[3,2,1]",
    "mtp.after_wrong_draft=mask",
]
LISTS = {
    "packed": ["cp2", "cp2-passing", "tp2", "pp2", "pp2-vpp2", "ep2", "cp2-ep2", "tp2-cp2", "--packed"],
    "larger": [
        "etp2",
        "ep2-allgather",
        "tp2-ep2-allgather",
        "tp2-ep2-etp2",
        "ep4",
        "pp4",
        "cp4",
        "cp4-passing",
        "dp4-overlap",
        "tp2-cp2-passing",
        "tp2-pp2-overlap",
        "pp2-vpp2-overlap",
        "pp2-vpp2-ep2",
        "tp2-dp2-overlap",
        "tp2-ep2-pp2",
    ],
    "two depths": ["tp2", "pp2-vpp2", "ep2", "cp2", "model.mtp_num_layers=2"],
    "one layer for two depths": [
        "tp2",
        "pp2-vpp2",
        "ep2",
        "cp2",
        "model.mtp_num_layers=2",
        "model.mtp_use_repeated_layer=true",
    ],
    "drafts": ["tp2", "pp2-vpp2", "ep2", "cp2", "tp2-cp2", *DRAFTS],
    "drafts in packed documents": ["tp2", "pp2", "cp2", "--packed", *DRAFTS],
    "drafts over a frozen trunk": [
        "tp2",
        "pp2",
        "pp2-vpp2",
        "cp2",
        "dp2-overlap",
        "pp2-ep2-overlap",
        "stage=mtp",
        "mtp.trunk=frozen",
        "checkpoint.load=not-read-by-the-check",
        *DRAFTS,
    ],
    "z loss and balance in a sequence": [
        "tp2",
        "pp2",
        "ep2",
        "cp2",
        "model.moe_z_loss_coeff=0.01",
        "model.moe_router_load_balancing_type=seq_aux_loss",
    ],
    "balance in padded documents": ["tp2", "pp2", "ep2", "cp2", "model.moe_z_loss_coeff=0.1", "--packed"],
    "balance in micro-batches of padded documents": [
        "tp2",
        "cp2",
        "model.moe_router_load_balancing_type=aux_loss",
        "--packed",
    ],
    "balance in a micro-batch": ["tp2", "ep2", "cp2", "model.moe_router_load_balancing_type=aux_loss"],
    "balance by a bias": [
        "tp2",
        "pp2",
        "ep2",
        "cp2",
        "dp2",
        "tp2-ep2",
        "model.moe_router_enable_expert_bias=true",
        "model.moe_router_bias_update_rate=0.02",
        "model.moe_aux_loss_coeff=0",
        "model.moe_router_load_balancing_type=none",
        "--reshard",
        "tp2:ep2",
        "ep2:dp2",
    ],
    "a gate for each head": [
        "tp2",
        "cp2",
        "tp2-cp2",
        "pp2",
        "model.attention_gate=headwise",
        "--reshard",
        "tp2:single",
    ],
    "one gate for all heads": [
        "tp2",
        "cp2",
        "tp2-cp2",
        "model.attention_gate_shared=true",
        "model.attention_gate_activation=silu",
        "--reshard",
        "tp2:cp2",
        "single:tp2",
    ],
    "gated values": ["tp2", "cp2", "tp2-cp2", "model.attention_gate_position=value", "--packed"],
    "windows": [
        "tp2",
        "cp2",
        "pp2",
        "tp2-cp2",
        "model.mixer_pattern='SG*S'",
        "model.attention_window_tokens=11",
        "model.backend=torch",
    ],
    "windows in packed documents": [
        "tp2",
        "cp2",
        "cp2-passing",
        "model.mixer_pattern='SG*S'",
        "model.attention_window_tokens=5",
        "model.backend=torch",
        "--packed",
    ],
    "only attention": ["tp2", "cp2", "pp2-vpp2", "model.mixer_pattern='*'"],
    "only Gated DeltaNet": ["tp2", "cp2", "pp2-vpp2", "model.mixer_pattern=G"],
}
RESHARDS = [
    "cp2-ep2:tp2-pp2",
    "pp2-vpp2:single",
    "single:pp2-vpp2",
    "tp2-ep2-etp2:cp2-passing",
    "pp4:ep4",
    "ep4:tp2-etp2",
    "dp2:tp2-pp2",
    "single:single",
]


@pytest.mark.parametrize("words", LISTS.values(), ids=LISTS)
def test_layouts_train_as_one_process_does(check_layouts: Callable[..., Any], words: list[str]) -> None:
    verdicts = check_layouts(*words, "--masked", "0.3", "--steps", "6")
    assert verdicts
    assert [verdict for verdict in verdicts.values() if not verdict["ok"]] == []


def test_runs_resume_in_other_layouts(check_layouts: Callable[..., Any]) -> None:
    verdicts = check_layouts("--masked", "0.3", "--steps", "6", "--reshard", *RESHARDS)
    assert len(verdicts) >= len(RESHARDS)
    assert [verdict for verdict in verdicts.values() if not verdict["ok"]] == []


def test_bf16_with_interleaved_stages(check_layouts: Callable[..., Any]) -> None:
    """Equal to one process except for rounding, and saved states are loaded: chunks of two dtypes share messages."""
    verdicts = check_layouts("precision=bf16", "--steps", "4", "--reshard", "pp2-vpp2:pp2-vpp2", "single:pp2-vpp2")
    assert verdicts["pp2-vpp2"]["loss"] < 1e-4
    assert verdicts["pp2-vpp2"]["grad norm"] < 1e-3
    assert verdicts["pp2-vpp2 → pp2-vpp2"]["ok"]
    assert verdicts["single → pp2-vpp2"]["ok"]
