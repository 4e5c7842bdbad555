"""Reinforcement learning: draw, grade, judge, look back, learn (rl/loop.py), recorded and saved like any run.

A run is saved between rollouts. What a resumed one must know beside the checkpoint is which prompt comes
next: `progress.jsonl` says it for every step that was saved. The samples of the rollout that begins after
step s are in `samples/after_step_s.jsonl`.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_q3n import checkpoint, parallel
from megatron_q3n.config import EXIT_REQUEUE, RunConfig, launch
from megatron_q3n.config.sizes import parameters
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.device import choose_device
from megatron_q3n.health.hang import HangWatch
from megatron_q3n.kernels.qualification import qualify
from megatron_q3n.metrics import jsonl
from megatron_q3n.metrics.recorder import Recorder, Status
from megatron_q3n.metrics.report import write_report
from megatron_q3n.model.build import compute_dtype
from megatron_q3n.rl.http_engine import HttpEngine
from megatron_q3n.rl.loop import RlLoop
from megatron_q3n.rl.prompts import Prompts
from megatron_q3n.rl.reference import Reference
from megatron_q3n.rl.rewards import Graders
from megatron_q3n.rl.rollout import InProcessEngine, RolloutEngine
from megatron_q3n.rl.samples import Sample
from megatron_q3n.stages import chat_format, run_directory
from megatron_q3n.stages.handover import Publisher
from megatron_q3n.stages.pretrain import start_weights
from megatron_q3n.training.state import TrainState, build_state

PROGRESS_FILE = "progress.jsonl"
SHOWN = 12  # held-out answers in the report


def run(config: RunConfig, run_dir: Path) -> int:
    """Train and report.

    Returns: 0 when all steps are done, 75 when stopped early with everything saved.
    """
    stop = run_directory.StopRequest(config.checkpoint.time_limit_minutes, time.monotonic())
    stop.listen()
    device = choose_device(config)
    group = parallel.initialize(config, device)
    run_dir = Path(group.from_leader(str(run_dir)))
    if checkpoint.newest_in(run_dir):
        run_directory.check_same_data(run_dir, config)
    tokenizer, template = chat_format.chat_format(config, run_dir)
    group.barrier()  # all have looked before the leader writes
    if group.is_leader:
        run_directory.open_directory(run_dir, config)
        chat_format.keep(run_dir, tokenizer, template)
    kernels = qualify(config, device.torch_device, compute_dtype(config))
    if group.is_leader:
        run_directory.record_environment(run_dir, device, kernels)
    state = build_state(config, device, group)
    reference = _reference(state) if config.rl.kl_coefficient else None
    origin = start_weights(state, run_dir)
    with Graders(config.rl.reward) as graders:
        loop = _loop(state, run_dir, graders, tokenizer, template, reference)
        stopped = _session(loop, template, run_dir, origin, stop.reason)
    if group.is_leader:
        print(f"\nrun directory {run_dir}\nreport        {run_dir / 'report.html'}")
    group.barrier()
    parallel.shutdown()
    return EXIT_REQUEUE if stopped else 0


def _session(
    loop: RlLoop,
    template: ChatTemplate,
    run_dir: Path,
    origin: list[str],
    stop_reason: Callable[[], str | None],
) -> bool:
    """Train from where the weights are to the end or a stop, and report.

    Returns: whether it was stopped.
    """
    state, is_leader = loop.state, loop.state.parallel.is_leader
    held_out = _held_out(loop, template)
    progress = jsonl.open_at(run_dir / PROGRESS_FILE, state.step) if is_leader else None
    _recall(loop, run_dir)
    recorder = Recorder(
        run_dir,
        state.config,
        first_step=state.step + 1,
        total_steps=state.config.training.steps,
        enabled=is_leader,
    )
    status: Status = "failed"
    try:
        recorder.note("\n".join([_introduction(loop, run_dir), *origin]))
        saver = checkpoint.Saver(state, run_dir, recorder.note)
        host = launch.node_name() or platform.node()
        watch = HangWatch(state.config.health, run_dir, state.parallel.rank, host)
        watch.start()
        session = _Session(loop, held_out, run_dir, recorder, saver, progress, watch)
        try:
            stopped = session.go(stop_reason)
        finally:
            watch.stop()
        if stopped:
            recorder.note(f"stopped at step {state.step}: {stopped}; everything is saved")
        elif is_leader:
            summary = {
                "steps": state.step,
                "parameters": parameters(state.config.model).total_with_mtp,
            }
            run_directory.write_json(run_dir / "summary.json", summary)
        status = "stopped" if stopped else "done"
    finally:
        recorder.close(status)
        if progress is not None:
            progress.close()
        if is_leader and (run_dir / "metrics.jsonl").exists():
            write_report(run_dir)
    return stopped is not None


@dataclass
class _Session:
    """One process's stretch of a run."""

    loop: RlLoop
    held_out: Prompts | None
    run_dir: Path
    recorder: Recorder
    saver: Any
    progress: jsonl.MetricsFile | None
    watch: HangWatch

    def go(self, stop_reason: Callable[[], str | None]) -> str | None:
        """Run the loop; return why it stopped early, or None."""
        loop, state = self.loop, self.loop.state
        last, reason = state.config.training.steps, None
        if state.step == 0:
            self._examine()
        while state.step < last and reason is None:
            began = time.perf_counter()  # a step's time holds its share of the rollout
            loop.engine.new_weights(state.step)
            samples, values = loop.rollout()
            self._write(f"after_step_{state.step:07d}", samples)
            for share in loop.shares(samples):
                values |= loop.learn(share)[1]
                self.watch.beat(time.perf_counter() - began)
                began = time.perf_counter()
                if _due(state.step, loop.settings.held_out_interval_steps, last):
                    values |= self._examine()
                self.recorder.log(state.step, values)
                values = {}
            reason = _agreed(state, stop_reason()) if state.step < last else None
            if reason or _due(state.step, state.config.checkpoint.interval_steps, last):
                self._save()
            self._settle(wait=False)
        self._settle(wait=True)
        return reason

    def _examine(self) -> dict[str, float]:
        """Measure the accuracy on held-out prompts, and keep the answers."""
        if self.held_out is None:
            return {}
        step = self.loop.state.step
        self.loop.engine.new_weights(step)
        accuracy, answers = self.loop.examine(self.held_out)
        self.watch.beat()
        self._write(f"held_out_{step:07d}", answers)
        if self.recorder.enabled:
            shown = [
                {
                    "prompt": str(s.prompt.grading.get("text", "")),
                    "text": f" → {s.text} ({s.score:g})",
                }
                for s in answers[:SHOWN]
            ]
            run_directory.write_json(self.run_dir / "samples.json", shown)
        self.recorder.note(f"held-out accuracy after step {step}: {accuracy:.3f}")
        return {"reward/held_out": accuracy}

    def _save(self) -> None:
        """Save; where the prompts stand goes first, so that no checkpoint is without it."""
        if self.progress is not None:
            loop = self.loop
            place: jsonl.Record = {
                "step": loop.state.step,
                "next_prompt": loop.next_prompt,
                "tokens": loop.tokens,
            }
            self.progress.append(place)
            self.progress.sync()
        self.saver.save()
        self.watch.beat()

    def _settle(self, *, wait: bool) -> None:
        for step in self.saver.settle(wait):
            self.recorder.checkpointed(step)

    def _write(self, name: str, samples: list[Sample]) -> None:
        """Leave the samples' table; a run that comes by again writes the same one."""
        if not self.recorder.enabled:
            return
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(_row(sample)) + "\n" for sample in samples]
        run_directory.write_atomically(folder / f"{name}.jsonl", "".join(lines))


def _loop(
    state: TrainState,
    run_dir: Path,
    graders: Graders,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    reference: Reference | None,
) -> RlLoop:
    rl = state.config.rl
    stop_tokens = frozenset({tokenizer.eod, template.end_of_turn})
    prompts = Prompts(
        rl.prompts, template, longest=_longest_prompt(state.config), seed=state.config.training.seed
    )
    engine = _engine(state, run_dir, tokenizer, stop_tokens)
    return RlLoop(state, engine, graders, prompts, tokenizer, stop_tokens, reference)


def _engine(
    state: TrainState, run_dir: Path, tokenizer: TextTokenizer, stop_tokens: frozenset[int]
) -> RolloutEngine:
    rl, seed = state.config.rl, state.config.training.seed
    if rl.rollout.engine == "http":
        seen_by_servers = Path(rl.rollout.handover) if rl.rollout.handover else None
        publish = Publisher(state, run_dir, seen_by_servers)
        return HttpEngine(state.parallel, rl.rollout, stop_tokens, seed, publish)
    return InProcessEngine(
        state.models[0],
        state.parallel,
        rl.rollout,
        stop_tokens,
        tokenizer.vocab_size,
        seed,
        records_routes=True,
    )


def _held_out(loop: RlLoop, template: ChatTemplate) -> Prompts | None:
    config = loop.state.config
    if not config.rl.held_out:
        return None
    longest = _longest_prompt(config)
    return Prompts(config.rl.held_out, template, longest=longest, seed=0, shuffled=False)


def _longest_prompt(config: RunConfig) -> int:
    """Return the tokens of the longest prompt that leaves room for an answer in a row of the trainer."""
    return config.training.sequence_length + 1 - config.rl.rollout.max_new_tokens


def _reference(state: TrainState) -> Reference:
    """Return the weights the run began with, whatever it goes on from."""
    load = state.config.checkpoint.load
    if load is not None:
        checkpoint.load(state, checkpoint.find(load), resume=False, with_optimizer=False)
    return Reference(state)


def _recall(loop: RlLoop, run_dir: Path) -> None:
    """Go on with the prompt behind those that the checkpoint's steps have used."""
    at = [r for r in jsonl.read(run_dir / PROGRESS_FILE) if r["step"] == loop.state.step]
    if at:
        loop.next_prompt, loop.tokens = int(at[-1]["next_prompt"]), int(at[-1]["tokens"])
    assert at or loop.state.step == 0, "a checkpoint without its line in progress.jsonl"


def _introduction(loop: RlLoop, run_dir: Path) -> str:
    config, rules, rollout = loop.state.config, loop.settings.rules, loop.settings.rollout
    left_out = f", {loop.prompts.num_left_out} too long" if loop.prompts.num_left_out else ""
    return (
        f"run directory {run_dir}\n"
        f"model {config.model.name}: {parameters(config.model).total_with_mtp / 1e6:.2f} M parameters, "
        f"{loop.state.parallel.world_size} process(es), {config.precision.compute}\n"
        f"prompts {len(loop.prompts)}{left_out}; {rollout.prompts} × {rollout.samples_per_prompt} samples a rollout, "
        f"{loop.settings.updates_per_rollout} update(s) each, {rollout.engine} engine\n"
        f"{loop.settings.algorithm}: {rules.ratio} ratio, clipped {rules.clip_low:g} below and {rules.clip_high:g} "
        f"above 1, normalised by {rules.normalisation}; routing replay "
        f"{'on' if loop.settings.routing_replay else 'off'}"
    )


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt.number,
        "member": sample.member,
        "question": sample.prompt.grading.get("text"),
        "text": sample.text,
        "score": sample.score,
        "failure": sample.failure,
        "reward": sample.reward,
        "advantage": sample.advantage,
        "tokens": len(sample.tokens),
        "finish_reason": sample.finish_reason,
        "policy_version": sample.policy_version,
    }


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)


def _agreed(state: TrainState, reason: str | None) -> str | None:
    if state.parallel.any(reason is not None):
        return reason or "another process was asked to stop"
    return None
