"""Program of test_resume.py: one uninterrupted run, and runs that are killed in each phase and then resumed.

It imports megatron-core once and forks the runs, which write their run directories. A run sends SIGKILL to its own
process from inside the phase, the second time the phase runs after the first checkpoint. Argument: the output folder.
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunConfig
from tests.rank_processes import fork_ranks, import_once
from tests.rl.tiny_loop import VOCAB, tiny_config, tokenizer

STEPS, INTERVAL, UPDATES = 12, 4, 2
# phase -> (module, path of the function, number of calls before the kill)
PHASES = {
    "rollout": ("megatron_q3n.inference.engine", "Engine.step", 30),
    "reward": ("megatron_q3n.rl.reward_workers", "RewardWorkers._score", 44),
    "update": ("megatron_q3n.rl.loop", "train_step", 5),
    "save": ("megatron_q3n.checkpoint.writer", "_finish", 1),
}


def configuration(folder: Path) -> RunConfig:
    """Return a run of a few rollouts, two updates each, with dynamic sampling."""
    tokenizer_dir = folder / "tokenizer"
    tokenizer_dir.mkdir(exist_ok=True)
    tokenizer().save(tokenizer_dir)
    return tiny_config(
        folder,
        {"updates_per_rollout": UPDATES, "dynamic_sampling": True, "dynamic_sampling_rounds": 3},
        data={"tokenizer": str(tokenizer_dir), "source": "blend", "train": [{"path": "unused"}]},
        training={"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 8, "steps": STEPS},
        checkpoint={"interval_steps": INTERVAL, "asynchronous": False},
        logging={"progress": False, "wandb": {"mode": "disabled"}},
        model={"embedding_init_method_std": 1.0, "vocab_size": VOCAB},
    )


def run(config: RunConfig, run_dir: Path, kill_point: tuple[str, str, int] | None, _rank: int) -> None:
    """Run one process of a run."""
    import importlib

    from megatron_q3n.stages import rl

    if kill_point:
        module, path, calls = kill_point
        *outer, name = path.split(".")
        owner = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, _killing_after(getattr(owner, name), calls))
    rl.run(config, run_dir)


def _killing_after(original: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """Return a function that kills its process in the call after `calls` calls."""
    num_calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        result = original(*arguments, **options) if num_calls <= calls else None
        if num_calls > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def main() -> int:
    """Fork the runs one after the other and return how many had an unexpected exit code."""
    folder = Path(sys.argv[1])
    config = configuration(folder)
    import_once(config, "megatron_q3n.stages.rl")
    num_failed = 0
    plans: list[tuple[str, Any, int]] = [("uninterrupted", None, 0)]
    for phase, kill_point in PHASES.items():
        plans += [(phase, kill_point, -signal.SIGKILL), (phase, None, 0)]
    for name, kill_point, expected in plans:
        num_failed += fork_ranks(partial(run, config, folder / name, kill_point), 1) != [expected]
    return num_failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
