"""Reinforcement learning: draw, grade, judge, look back, learn (rl/loop.py), recorded and saved like any run.

A run is saved between rollouts. What a resumed one must know beside the checkpoint is which prompt comes
next (stages/rl_files.py). A roll-back (health.*) leaves out the rollout that the bad update learnt from.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_q3n import checkpoint, parallel, run_directory
from megatron_q3n.checkpoint import folders
from megatron_q3n.config import EXIT_REQUEUE, RunConfig, UserError
from megatron_q3n.config.sizes import parameters
from megatron_q3n.device import choose_device
from megatron_q3n.health.watch import Watch
from megatron_q3n.instruments import Instruments
from megatron_q3n.kernels.startup.qualification import qualify
from megatron_q3n.metrics import jsonl, sample_tables
from megatron_q3n.metrics.recorder import RECORDS_FILE, Recorder, Status
from megatron_q3n.metrics.report import write_report
from megatron_q3n.model.build import compute_dtype
from megatron_q3n.rl.loop import Learnt, RlLoop
from megatron_q3n.rl.prompts import Prompts
from megatron_q3n.rl.rewards import Graders
from megatron_q3n.stages import chat_format
from megatron_q3n.stages.pretrain import start_weights
from megatron_q3n.stages.rl_files import RlFiles
from megatron_q3n.stages.rl_setup import build_loop, held_out_prompts, introduction
from megatron_q3n.training.guard import UpdateGuard
from megatron_q3n.training.state import TrainState, build_state
from megatron_q3n.training.watch import Verdict


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
    hooks = state.models[0].config
    watch = Watch(config, group, run_dir, is_cuda=device.is_cuda, hooks=hooks)
    UpdateGuard(state, watch.admit)
    keep_load = partial(run_directory.write_expert_load, run_dir)
    instruments = Instruments(state, keep_load if group.is_leader else lambda *_: None)
    with Graders(config.rl.reward) as graders:
        loop = build_loop(state, run_dir, graders, tokenizer, template, watch.beat)
        files = RlFiles(run_dir, loop)
        held_out = held_out_prompts(config, template)
        session = partial(_session, loop, held_out, files, run_dir, watch, instruments, stop.reason)
        ended = session()
        while ended.verdict == "roll_back":
            ended = session()
    if ended.verdict == "stop":
        raise UserError(watch.why_stopped())
    if group.is_leader:
        print(f"\nrun directory {run_dir}\nreport        {run_dir / 'report.html'}")
    group.barrier()
    parallel.shutdown()
    return EXIT_REQUEUE if ended.stopped else 0


@dataclass(frozen=True)
class Ended:
    """How a session ended: `stopped` is None when all steps are done, or the watch's verdict ended it."""

    stopped: str | None
    verdict: Verdict = "go_on"


def _session(
    loop: RlLoop,
    held_out: Prompts | None,
    files: RlFiles,
    run_dir: Path,
    watch: Watch,
    instruments: Instruments,
    stop_reason: Callable[[], str | None],
) -> Ended:
    """Train from the newest checkpoint to the end, a stop, or a bad step that ends it; record and report it."""
    state, is_leader = loop.state, loop.state.parallel.is_leader
    watch.start()
    origin = start_weights(state, run_dir)
    files.recall()
    recorder = Recorder(
        run_dir, state.config, first_step=state.step + 1, total_steps=state.config.training.steps, enabled=is_leader
    )
    status: Status = "failed"
    try:
        recorder.note("\n".join([introduction(loop, run_dir), *origin]))
        saver = checkpoint.Saver(state, run_dir, recorder.note)
        watch.begin(_past_steps(run_dir, state.config), recorder.note)
        session = _Session(loop, held_out, files, recorder, saver, watch, instruments)
        ended = session.go(stop_reason)
        watch.stop()
        if ended.verdict == "roll_back":
            newest = checkpoint.newest_in(run_dir)
            assert newest is not None
            files.leave_out(state.config.health.leave_out_batches)
            watch.leave_out(folders.step_of(newest))
        elif ended.verdict == "stop":
            recorder.note(watch.why_stopped())
            return ended
        elif ended.stopped:
            recorder.note(f"stopped at step {state.step}: {ended.stopped}; everything is saved")
        elif is_leader:
            run_directory.write_json(run_dir / "summary.json", _summary(state))
        status = "done" if state.step == state.config.training.steps else "stopped"
    finally:
        watch.stop()
        recorder.close(status)
        files.close()
        if is_leader and (run_dir / "metrics.jsonl").exists():
            write_report(run_dir)
    return ended


@dataclass
class _Session:
    """One process's stretch of a run."""

    loop: RlLoop
    held_out: Prompts | None
    files: RlFiles
    recorder: Recorder
    saver: Any
    watch: Watch
    instruments: Instruments

    def go(self, stop_reason: Callable[[], str | None]) -> Ended:
        """Run the loop; return how it ended."""
        loop, state = self.loop, self.loop.state
        last, reason = state.config.training.steps, None
        self._save_what_to_roll_back_to()
        if state.step == 0:
            self._examine()
        while state.step < last and reason is None:
            began = time.perf_counter()  # a step's time holds its share of the rollout
            loop.engine.new_weights(state.step)
            samples, values = loop.rollout()
            self.files.write(sample_tables.ROLLOUT, state.step, samples)
            for share in loop.shares(samples):
                self.watch.before_step()
                self.instruments.before_step()
                learnt = loop.learn(share)
                self.watch.beat(time.perf_counter() - began)
                began = time.perf_counter()
                values |= learnt.values | self.watch.after_step(state.step, 0.0)
                if self.watch.verdict != "go_on":
                    self._settle(wait=True)
                    return Ended(None, self.watch.verdict)
                values |= self._measure(learnt)
                if _due(state.step, loop.settings.held_out_interval_steps, last):
                    values |= self._examine()
                self.recorder.log(state.step, values)
                values = {}
            reason = _agreed(state, stop_reason()) if state.step < last else None
            if reason or _due(state.step, state.config.checkpoint.interval_steps, last):
                self._save()
            self._settle(wait=False)
        self._settle(wait=True)
        return Ended(reason)

    def _measure(self, learnt: Learnt) -> dict[str, float]:
        """Look inside the model, if this step is one to be looked at, and say how long that took."""
        started = time.perf_counter()
        measured = self.instruments.after_step(learnt.batches, learnt.report)
        if measured:
            self.loop.state.device.synchronize()
            measured["throughput/instruments_seconds"] = time.perf_counter() - started
            self.watch.beat()
        return measured

    def _examine(self) -> dict[str, float]:
        """Measure the accuracy on held-out prompts, and keep the answers."""
        if self.held_out is None:
            return {}
        step = self.loop.state.step
        self.loop.engine.new_weights(step)
        accuracy, answers = self.loop.examine(self.held_out)
        self.watch.beat()
        self.files.write(sample_tables.HELD_OUT, step, answers)
        self.recorder.note(f"held-out accuracy after step {step}: {accuracy:.3f}")
        return {"reward/held_out": accuracy}

    def _save_what_to_roll_back_to(self) -> None:
        """Save the beginning of a run that may want to go back before its first checkpoint."""
        health = self.loop.state.config.health
        if self.loop.state.step == 0 and "roll_back" in (health.non_finite, health.loss_spike):
            self._save()
            self._settle(wait=True)

    def _save(self) -> None:
        self.files.remember()
        self.saver.save()
        self.watch.beat()

    def _settle(self, *, wait: bool) -> None:
        for step in self.saver.settle(wait):
            self.recorder.checkpointed(step)


def _past_steps(run_dir: Path, config: RunConfig) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of the newest recorded steps, which a new one is judged by."""
    records = jsonl.read(run_dir / RECORDS_FILE)[-config.health.spike_window_steps :]
    return [(r.get("loss/policy", math.nan), r.get("grad_norm", math.nan)) for r in records]


def _summary(state: TrainState) -> dict[str, Any]:
    return {"steps": state.step, "parameters": parameters(state.config.model).total_with_mtp}


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)


def _agreed(state: TrainState, reason: str | None) -> str | None:
    if state.parallel.any(reason is not None):
        return reason or "another process was asked to stop"
    return None
