"""Files of a reinforcement learning run beside its checkpoints and metrics.

    progress.jsonl         the position in the prompt stream at every saved step
    skipped_prompts.json   half-open ranges [first, end) of prompts, of rollouts that a roll-back skips
    samples/               every rollout and every evaluation (metrics/sample_tables.py)

All are written by the leader. Skipped prompts are outside the checkpoints, so that they survive a roll-back to an
earlier one.
"""

import json
from pathlib import Path
from typing import Any

from megatron_q3n import run_directory
from megatron_q3n.metrics import jsonl, sample_tables
from megatron_q3n.rl.loop import RlLoop
from megatron_q3n.rl.samples import Sample

PROGRESS = "progress.jsonl"
SKIPPED_PROMPTS = "skipped_prompts.json"


class RlFiles:
    """Writer and reader of these files; restores the loop's position in the prompt stream."""

    def __init__(self, run_dir: Path, loop: RlLoop) -> None:
        self._run_dir, self._loop = run_dir, loop
        self._is_leader = loop.state.parallel.is_leader
        self._progress: jsonl.MetricsFile | None = None

    def restore(self) -> None:
        """Set the loop's position in the prompt stream to that of the checkpoint's step. A collective call."""
        loop, group = self._loop, self._loop.state.parallel
        content = json.dumps([self._read_progress(), self._read_skipped()]) if self._is_leader else None
        records, ranges = json.loads(group.from_leader(content))
        matches = [record for record in records if record["step"] == loop.state.step]
        assert matches or loop.state.step == 0, "a checkpoint without its line in progress.jsonl"
        loop.next_prompt, loop.tokens = (matches[-1]["next_prompt"], matches[-1]["tokens"]) if matches else (0, 0)
        loop.skipped_prompts = [(first, end) for first, end in ranges]
        loop.rollout_prompts.clear()
        if self._is_leader:
            self._progress = jsonl.open_at(self._run_dir / PROGRESS, loop.state.step)

    def record_position(self) -> None:
        """Append the position in the prompt stream, before the checkpoint, which needs this record to resume."""
        loop = self._loop
        loop.rollout_prompts.clear()
        # at step 0 no prompt is used
        if self._progress is not None and loop.state.step:
            record: jsonl.Record = {"step": loop.state.step, "next_prompt": loop.next_prompt, "tokens": loop.tokens}
            self._progress.append(record)
            self._progress.sync()

    def skip_rollouts(self, num_rollouts: int) -> None:
        """Skip the prompts of the last `num_rollouts` rollouts when the run continues."""
        ranges = [*self._loop.skipped_prompts, *self._loop.rollout_prompts[-num_rollouts:]]
        if self._is_leader:
            run_directory.write_json(self._run_dir / SKIPPED_PROMPTS, ranges)

    def write_samples(self, kind: str, step: int, samples: list[Sample]) -> None:
        """Write a table of samples; a resumed run that repeats the step writes the same one."""
        if not self._is_leader:
            return
        path = sample_tables.file_of(self._run_dir, kind, step)
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(_row(sample)) + "\n" for sample in samples]
        run_directory.write_atomically(path, "".join(lines))

    def close(self) -> None:
        """Close the open file."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def _read_progress(self) -> list[jsonl.Record]:
        return jsonl.read(self._run_dir / PROGRESS)

    def _read_skipped(self) -> list[list[int]]:
        path = self._run_dir / SKIPPED_PROMPTS
        return json.loads(path.read_text()) if path.is_file() else []


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt.number,
        "member": sample.member,
        "question": sample.prompt.scoring_arguments.get("text"),
        "answer": sample.prompt.scoring_arguments.get("answer"),
        "text": sample.text,
        "score": sample.score,
        "failure": sample.failure,
        "reward": sample.reward,
        "advantage": sample.advantage,
        "tokens": len(sample.tokens),
        "finish_reason": sample.finish_reason,
        "policy_version": sample.policy_version,
    }
