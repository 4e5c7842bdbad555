"""What a run of reinforcement learning keeps beside its checkpoints and metrics.

    progress.jsonl         where the prompts stood at every step that was saved
    skipped_prompts.json   [first, behind the last] prompt of rollouts that a roll-back left out
    samples/               every rollout and every examination (metrics/sample_tables.py)

All are written by the leader. Prompts left out are outside the checkpoints, since going back to one must not forget
them.
"""

import json
from pathlib import Path
from typing import Any

from megatron_q3n import run_directory
from megatron_q3n.metrics import jsonl, sample_tables
from megatron_q3n.rl.loop import RlLoop
from megatron_q3n.rl.samples import Sample

PROGRESS = "progress.jsonl"
LEFT_OUT = "skipped_prompts.json"


class RlFiles:
    """The files of one run, and what a loop must be told of them."""

    def __init__(self, run_dir: Path, loop: RlLoop) -> None:
        self._run_dir, self._loop = run_dir, loop
        self._is_leader = loop.state.parallel.is_leader
        self._progress: jsonl.MetricsFile | None = None

    def recall(self) -> None:
        """Go on with the prompt behind those that the checkpoint's steps have used. A collective call."""
        loop, group = self._loop, self._loop.state.parallel
        known = json.dumps([self._places(), self._ranges()]) if self._is_leader else None
        places, ranges = json.loads(group.from_leader(known))
        at = [place for place in places if place["step"] == loop.state.step]
        assert at or loop.state.step == 0, "a checkpoint without its line in progress.jsonl"
        loop.next_prompt, loop.tokens = (at[-1]["next_prompt"], at[-1]["tokens"]) if at else (0, 0)
        loop.left_out = [(first, last) for first, last in ranges]
        loop.drawn.clear()
        if self._is_leader:
            self._progress = jsonl.open_at(self._run_dir / PROGRESS, loop.state.step)

    def remember(self) -> None:
        """Write down where the prompts stand, before the checkpoint: none may be without it."""
        loop = self._loop
        loop.drawn.clear()
        if self._progress is not None and loop.state.step:  # at step 0 nothing is drawn
            place: jsonl.Record = {"step": loop.state.step, "next_prompt": loop.next_prompt, "tokens": loop.tokens}
            self._progress.append(place)
            self._progress.sync()

    def leave_out(self, rollouts: int) -> None:
        """Pass over the prompts of the last so many rollouts from now on."""
        ranges = [*self._loop.left_out, *self._loop.drawn[-rollouts:]]
        if self._is_leader:
            run_directory.write_json(self._run_dir / LEFT_OUT, ranges)

    def write(self, kind: str, step: int, samples: list[Sample]) -> None:
        """Leave a table of samples; a run that comes by again writes the same one."""
        if not self._is_leader:
            return
        path = sample_tables.file_of(self._run_dir, kind, step)
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(_row(sample)) + "\n" for sample in samples]
        run_directory.write_atomically(path, "".join(lines))

    def close(self) -> None:
        """Let go of open files."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def _places(self) -> list[jsonl.Record]:
        return jsonl.read(self._run_dir / PROGRESS)

    def _ranges(self) -> list[list[int]]:
        path = self._run_dir / LEFT_OUT
        return json.loads(path.read_text()) if path.is_file() else []


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt.number,
        "member": sample.member,
        "question": sample.prompt.grading.get("text"),
        "answer": sample.prompt.grading.get("answer"),
        "text": sample.text,
        "score": sample.score,
        "failure": sample.failure,
        "reward": sample.reward,
        "advantage": sample.advantage,
        "tokens": len(sample.tokens),
        "finish_reason": sample.finish_reason,
        "policy_version": sample.policy_version,
    }
