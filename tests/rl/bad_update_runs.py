"""Program of test_bad_update.py: runs with one rollout of NaN advantages, under each `health.non_finite` policy.

It imports megatron-core once and forks the runs, which write their run directories. `roll_back` also has instruments
and wandb; `clean` has neither, and skips the bad prompts from the beginning. Argument: the output folder.
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
# the first of the third rollout, which begins after step 4
BAD_PROMPT = 8
RUNS: dict[str, dict[str, Any]] = {
    "skip": {"health": {"non_finite": "skip"}},
    "roll_back": {
        "health": {"non_finite": "roll_back"},
        "instruments": {"interval_steps": 4},
        "logging": {"progress": False, "wandb": {"mode": "offline"}},
    },
    "clean": {"health": {"non_finite": "roll_back"}},
    "stop": {"health": {"non_finite": "stop"}},
    "unscored": {"reward": "score_of_nothing"},
}
EXIT_CODES = {"stop": 2, "unscored": 2}


def score_of_nothing(_answer: str, _arguments: dict[str, Any]) -> None:
    """Return no score, as a function without a return statement."""


def configuration(folder: Path, run: dict[str, Any]) -> RunConfig:
    """Return a run of a few rollouts, two updates each."""
    tokenizer_dir = folder / "tokenizer"
    tokenizer_dir.mkdir(exist_ok=True)
    tokenizer().save(tokenizer_dir)
    sections: dict[str, Any] = {
        "data": {"tokenizer": str(tokenizer_dir), "source": "blend", "train": [{"path": "unused"}]},
        "training": {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 8, "steps": STEPS},
        "checkpoint": {"interval_steps": INTERVAL},
        "instruments": {"interval_steps": 0},
        "logging": {"progress": False, "wandb": {"mode": "disabled"}},
        "model": {"embedding_init_method_std": 1.0, "vocab_size": VOCAB},
    }
    held_out = [{"path": str(folder / "prompts.jsonl")}]
    rl: dict[str, Any] = {"updates_per_rollout": UPDATES, "held_out": held_out, "held_out_interval_steps": 6}
    if function := run.get("reward"):
        rl |= {"reward": {"kind": "function", "function": f"tests.rl.bad_update_runs:{function}", "workers": 1}}
    return tiny_config(folder, rl, **sections | {name: value for name, value in run.items() if name != "reward"})


def run_once(config: RunConfig, run_dir: Path, _rank: int) -> None:
    """Run one process of a run, with the exit code of the command line."""
    from megatron_q3n.config import EXIT_BAD_INPUT, UserError
    from megatron_q3n.rl.loop import RlLoop
    from megatron_q3n.stages import rl

    compute_advantages = RlLoop.compute_advantages

    def compute_nan_advantages(self: Any, samples: list[Any]) -> None:
        compute_advantages(self, samples)
        if samples[0].prompt.number == BAD_PROMPT:
            for sample in samples:
                sample.advantage = float("nan")

    RlLoop.compute_advantages = compute_nan_advantages  # type: ignore[method-assign]
    try:
        rl.run(config, run_dir)
    except UserError as error:
        (run_dir / "refused.txt").write_text(str(error))
        os._exit(EXIT_BAD_INPUT)


def main() -> int:
    """Fork the runs one after the other and return how many had an unexpected exit code."""
    folder = Path(sys.argv[1])
    import_once(configuration(folder, {}), "megatron_q3n.stages.rl")
    (folder / "clean").mkdir()
    skipped = [[BAD_PROMPT, BAD_PROMPT + 4]]
    (folder / "clean" / "skipped_prompts.json").write_text(json.dumps(skipped))
    num_failed = 0
    for name, run in RUNS.items():
        codes = fork_ranks(partial(run_once, configuration(folder, run), folder / name), 1)
        num_failed += codes != [EXIT_CODES.get(name, 0)]
    return num_failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
