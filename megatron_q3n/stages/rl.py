"""Reinforcement learning stage: rollouts and updates (rl/loop.py) in a training session.

A run is saved between rollouts. Beside the checkpoint, resuming needs the position in the prompts (stages/rl_files.py).
A roll-back (health.*) skips the rollout of the bad update.
"""

import time
from pathlib import Path

from megatron_q3n import run_directory
from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import parameters
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.metrics import sample_tables
from megatron_q3n.rl.loop import RlLoop
from megatron_q3n.rl.prompts import Prompts
from megatron_q3n.rl.reward_workers import RewardWorkers
from megatron_q3n.stages import chat_format
from megatron_q3n.stages.rl_files import RlFiles
from megatron_q3n.stages.rl_setup import build_loop, held_out_prompts, introduction, isolation_lines
from megatron_q3n.stages.session import Session
from megatron_q3n.training.callbacks import Callback, RunStatus, Verdict
from megatron_q3n.training.loop_hooks import LoopHooks, LoopResult


def run(config: RunConfig, run_dir: Path) -> int:
    """Train and report.

    Returns: 0 when all steps are done, 75 when stopped early with everything saved.
    """
    return Session(config, run_dir, RlStage()).run()


class RlStage:
    """Stage that alternates rollouts and updates on them."""

    loss_metric = "loss/policy"
    tokenizer: TextTokenizer
    template: ChatTemplate
    loop: RlLoop
    files: RlFiles
    held_out: Prompts | None

    def load_data(self, session: Session) -> None:
        """Load tokenizer and chat template."""
        self.tokenizer, self.template = chat_format.load_chat_format(session.config, session.run_dir)
        # all ranks have read before the leader writes
        session.group.barrier()

    def build(self, session: Session) -> list[Callback]:
        """Start the reward workers, and build the rollout engine, prompts and reference policy."""
        config, run_dir = session.config, session.run_dir
        if session.group.is_leader:
            chat_format.save(run_dir, self.tokenizer, self.template)
        workers = session.resources.enter_context(RewardWorkers(config.rl.reward))
        self.loop = build_loop(session.state, run_dir, workers, self.tokenizer, self.template, session.heartbeat)
        self.files = RlFiles(run_dir, self.loop)
        self.held_out = held_out_prompts(config, self.template)
        self._run_dir = run_dir
        self._isolation = workers.wait_until_ready()
        if session.group.is_leader:
            run_directory.record_isolation(run_dir, self._isolation)
        return [PromptPosition(self.files, config.health.skip_batches)]

    def introduction(self) -> list[str]:
        """Return the lines on prompts and algorithm."""
        return [*introduction(self.loop, self.held_out), *isolation_lines(self._isolation)]

    def train(self, hooks: LoopHooks) -> LoopResult:
        """Generate rollouts and update on them."""
        state, result = self.loop.state, LoopResult()
        if state.step == 0:
            self._evaluate(hooks)
        while state.step < state.config.training.steps and not result.stopped:
            result.verdict = self._train_on_rollout(hooks)
            if result.verdict != "go_on":
                break
            result.stopped = hooks.agreed_stop()
            if result.stopped or hooks.is_due(state.config.checkpoint.interval_steps):
                hooks.save_checkpoint()
            hooks.report_saved(wait=False)
        hooks.report_saved(wait=True)
        return result

    def conclude(self, result: LoopResult) -> None:
        """Write summary.json."""
        state = self.loop.state
        summary = {"steps": state.step, "parameters": parameters(state.config.model).total_with_mtp}
        run_directory.write_json(self._run_dir / "summary.json", summary)

    def _train_on_rollout(self, hooks: LoopHooks) -> Verdict:
        """Generate one rollout and take the optimizer steps on it. The first step's time includes the rollout."""
        loop, state = self.loop, self.loop.state
        started = time.perf_counter()
        loop.engine.update_weights(state.step)
        samples, values = loop.rollout()
        self._log_notes(hooks)
        self.files.write_samples(sample_tables.ROLLOUT, state.step, samples)
        for minibatch in loop.minibatches(samples):
            hooks.callbacks.before_step(state.step + 1)
            update = loop.update(minibatch)
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            values |= update.values | hooks.finish_step(update.report, seconds)
            if hooks.callbacks.verdict != "go_on":
                break
            if hooks.is_due(loop.settings.held_out_interval_steps):
                values |= self._evaluate(hooks)
            hooks.recorder.log(state.step, values)
            values = {}
        return hooks.callbacks.verdict

    def _log_notes(self, hooks: LoopHooks) -> None:
        for line in self.loop.notes:
            hooks.recorder.note(line)
        self.loop.notes.clear()

    def _evaluate(self, hooks: LoopHooks) -> dict[str, float]:
        """Measure the accuracy on held-out prompts, and write the completions."""
        if self.held_out is None:
            return {}
        step = self.loop.state.step
        self.loop.engine.update_weights(step)
        accuracy, samples = self.loop.evaluate(self.held_out)
        self._log_notes(hooks)
        self.files.write_samples(sample_tables.HELD_OUT, step, samples)
        hooks.recorder.note(f"held-out accuracy after step {step}: {accuracy:.3f}")
        metrics = {"reward/eval_accuracy": accuracy}
        hooks.validated(metrics)
        return metrics


class PromptPosition(Callback):
    """Position in the prompts, saved and loaded with the weights."""

    def __init__(self, files: RlFiles, num_skipped_rollouts: int) -> None:
        self._files, self._num_skipped_rollouts = files, num_skipped_rollouts

    def after_load(self, step: int) -> None:
        """Restore the position of the step."""
        self._files.close()
        self._files.restore()

    def before_save(self, step: int) -> None:
        """Record the position before the checkpoint: no checkpoint may be without it."""
        self._files.record_position()

    def on_rollback(self, step: int) -> None:
        """Skip the last rollouts from now on."""
        self._files.skip_rollouts(self._num_skipped_rollouts)

    def on_run_end(self, status: RunStatus) -> None:
        """Close the file."""
        self._files.close()
