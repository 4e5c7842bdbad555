"""One whole run, and runs that are killed in each phase and then go on; each leaves its run directory.

A program, started by test_resume.py: it imports megatron-core once and forks the runs. A run is killed by SIGKILL of
its own process, from inside the phase, the second time that phase has come after the first checkpoint. Argument: a
folder to leave things in.
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
# phase -> (module, its attribute's path, how many calls it survives)
PHASES = {
    "rollout": ("megatron_q3n.inference.engine", "Engine.step", 30),
    "reward": ("megatron_q3n.rl.rewards", "Graders._score", 44),
    "update": ("megatron_q3n.rl.loop", "train_step", 5),
    "save": ("megatron_q3n.checkpoint.writer", "_finish", 1),
}


def configuration(folder: Path) -> RunConfig:
    """Return a run of a few rollouts, two updates each, with groups drawn anew."""
    words = folder / "words"
    words.mkdir(exist_ok=True)
    tokenizer().save(words)
    return tiny_config(
        folder,
        {"updates_per_rollout": UPDATES, "dynamic_sampling": True, "dynamic_sampling_rounds": 3},
        data={"tokenizer": str(words), "source": "blend", "train": [{"path": "unused"}]},
        training={"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 8, "steps": STEPS},
        checkpoint={"interval_steps": INTERVAL, "asynchronous": False},
        logging={"progress": False, "wandb": {"mode": "disabled"}},
        model={"embedding_init_method_std": 1.0, "vocab_size": VOCAB},
    )


def run(config: RunConfig, run_dir: Path, deadly: tuple[str, str, int] | None, _rank: int) -> None:
    """Be one process of a run."""
    import importlib

    from megatron_q3n.stages import rl

    if deadly:
        module, path, calls = deadly
        *outer, name = path.split(".")
        place = importlib.import_module(module)
        for part in outer:
            place = getattr(place, part)
        setattr(place, name, _dying(getattr(place, name), calls))
    rl.run(config, run_dir)


def _dying(real: Callable[..., Any], calls: int) -> Callable[..., Any]:
    survived = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal survived
        survived += 1
        result = real(*arguments, **options) if survived <= calls else None
        if survived > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def main() -> int:
    """Fork the runs one after the other and return how many ended otherwise than they should."""
    folder = Path(sys.argv[1])
    config = configuration(folder)
    import_once(config, "megatron_q3n.stages.rl")
    wrong = 0
    plans: list[tuple[str, Any, int]] = [("whole", None, 0)]
    for phase, deadly in PHASES.items():
        plans += [(phase, deadly, -signal.SIGKILL), (phase, None, 0)]
    for name, deadly, expected in plans:
        wrong += fork_ranks(partial(run, config, folder / name, deadly), 1) != [expected]
    return wrong


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
