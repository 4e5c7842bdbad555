"""Program: plant faults in the training code, one at a time, and print the layout check's verdict on each as JSON.

A separate process, since the check forks; one for all faults, since importing megatron-core is slow. Each fault omits a
reduction or a wait that a single process does not need.
"""

import importlib
import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tools.checks import check_layout

STEPS = ["--steps", "4", "--masked", "0.3"]
SINGLE_RANK: Any = SimpleNamespace(size=lambda: 1)


def main() -> None:
    """Check one layout per fault."""
    gradients = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    router = importlib.import_module("megatron_q3n.model.moe.router")
    state = importlib.import_module("megatron_q3n.training.state")
    tally = importlib.import_module("megatron_q3n.instruments.tally")
    step = importlib.import_module("megatron_q3n.training.step")
    balance = router.finish_balance
    faults: dict[str, tuple[list[str], Any, str, Any]] = {
        "none": (["dp2"], step, "finish_balance", balance),
        "expert counts are not reduced over ranks": (
            ["dp2"],
            step,
            "finish_balance",
            lambda routers, group: balance(routers, SINGLE_RANK),
        ),
        "norms' gradients are not summed over tensor-parallel ranks": (
            ["tp2"],
            gradients,
            "_allreduce_non_tensor_model_parallel_grads",
            lambda *_, **__: None,
        ),
        "experts run before their weights are gathered": (
            ["dp2-overlap"],
            state,
            "_wait_for_gather_at_entry",
            lambda _: None,
        ),
        "gradients of MTP's embedding are not reduced over stages": (
            ["pp2"],
            gradients,
            "_allreduce_word_embedding_grads",
            lambda *_, **__: None,
        ),
        "numbers of the instruments are not reduced over ranks": (
            ["cp2", "instruments.interval_steps=2"],
            tally.Tally,
            "all_reduce",
            lambda *_: None,
        ),
        "a checkpoint is saved before the weights are gathered": (
            ["--reshard", "dp2-overlap:single"],
            state.TrainState,
            "gather_parameters",
            lambda _: None,
        ),
    }
    verdicts = {}
    for fault, (words, module, name, wrong) in faults.items():
        with patch.object(module, name, wrong):
            options, layouts = check_layout._parser().parse_known_args([*STEPS, *words])
            verdicts[fault] = check_layout.check(options, layouts)[1][-1]
    print(json.dumps(verdicts))


if __name__ == "__main__":
    check_layout.register_defaults()
    check_layout.import_everything(check_layout.configure(["--config-name", "pretrain-tiny"]))
    main()
