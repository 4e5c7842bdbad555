"""Runs that meet a rollout whose advantages are not numbers, under each policy; each leaves its run directory.

A program, started by test_trouble.py: it imports megatron-core once and forks the runs. `roll_back` is also looked at
by the instruments and told to wandb; `clean` is not, and has been told beforehand which prompts to leave out. Argument:
a folder to leave things in.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunConfig
from tests.rank_processes import fork_ranks, import_once
from tests.rl.tiny_loop import VOCAB, tiny_config, tokenizer

STEPS, INTERVAL, UPDATES = 12, 4, 2
BAD_PROMPT = 8  # the first of the third rollout, which begins after step 4
RUNS: dict[str, dict[str, Any]] = {
    "skip": {"health": {"non_finite": "skip"}},
    "roll_back": {
        "health": {"non_finite": "roll_back"},
        "instruments": {"interval_steps": 4},
        "logging": {"progress": False, "wandb": {"mode": "offline"}},
    },
    "clean": {"health": {"non_finite": "roll_back"}},
    "stop": {"health": {"non_finite": "stop"}},
}
ENDS = {"stop": 2}


def configuration(folder: Path, run: dict[str, Any]) -> RunConfig:
    """Return a run of a few rollouts, two updates each."""
    words = folder / "words"
    words.mkdir(exist_ok=True)
    tokenizer().save(words)
    sections: dict[str, Any] = {
        "data": {"tokenizer": str(words), "source": "blend", "train": [{"path": "unused"}]},
        "training": {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 8, "steps": STEPS},
        "checkpoint": {"interval_steps": INTERVAL},
        "instruments": {"interval_steps": 0},
        "logging": {"progress": False, "wandb": {"mode": "disabled"}},
        "model": {"embedding_init_method_std": 1.0, "vocab_size": VOCAB},
    }
    held_out = [{"path": str(folder / "prompts.jsonl")}]
    rl = {"updates_per_rollout": UPDATES, "held_out": held_out, "held_out_interval_steps": 6}
    return tiny_config(folder, rl, **sections | run)


def be(config: RunConfig, run_dir: Path, _rank: int) -> None:
    """Be one process of a run, and end as a user's would."""
    from megatron_q3n.config import EXIT_BAD_INPUT, UserError
    from megatron_q3n.rl.loop import RlLoop
    from megatron_q3n.stages import rl

    judge = RlLoop.judge

    def spoilt(self: Any, samples: list[Any]) -> None:
        judge(self, samples)
        if samples[0].prompt.number == BAD_PROMPT:
            for sample in samples:
                sample.advantage = float("nan")

    RlLoop.judge = spoilt  # type: ignore[method-assign]
    try:
        rl.run(config, run_dir)
    except UserError as error:
        (run_dir / "refused.txt").write_text(str(error))
        os._exit(EXIT_BAD_INPUT)


def main() -> int:
    """Fork the runs one after the other and return how many ended otherwise than they should."""
    folder = Path(sys.argv[1])
    import_once(configuration(folder, {}), "megatron_q3n.stages.rl")
    (folder / "clean").mkdir()
    left_out = [[BAD_PROMPT, BAD_PROMPT + 4]]
    (folder / "clean" / "skipped_prompts.json").write_text(json.dumps(left_out))
    wrong = 0
    for name, run in RUNS.items():
        codes = fork_ranks(partial(be, configuration(folder, run), folder / name), 1)
        wrong += codes != [ENDS.get(name, 0)]
    return wrong


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
