"""Training session: the part that pretraining, fine-tuning, MTP training and RL have in common, start to report.

A `Session` starts (device, process groups, run directory), qualifies kernels, builds the state, loads weights, resumes,
records, saves, monitors health, rolls back, stops and reports. A `Stage` brings the rest: its data or prompts, its
loop, lines for the introduction, and a conclusion.

The order of the calls is part of the contract: it decides the use of random numbers and what is loaded and saved when.
"""

import gc
import math
import shlex
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_q3n import checkpoint, parallel, run_directory
from megatron_q3n.checkpoint import folders
from megatron_q3n.config import EXIT_BAD_INPUT, EXIT_REQUEUE, RunConfig, UserError
from megatron_q3n.config.sizes import parameters
from megatron_q3n.data.run_inputs import InputRecord
from megatron_q3n.device import select_device
from megatron_q3n.health.monitor import HealthMonitor
from megatron_q3n.instruments import Instruments
from megatron_q3n.kernels.startup.qualification import qualify
from megatron_q3n.metrics import jsonl
from megatron_q3n.metrics.recorder import RECORDS_FILE, Recorder, Status
from megatron_q3n.metrics.report import write_report
from megatron_q3n.model.transformer_config import compute_dtype, make_plan
from megatron_q3n.run_lock import RunLock
from megatron_q3n.training.callbacks import Callback, CallbackList, RunContext, load_callbacks
from megatron_q3n.training.guard import UpdateGuard
from megatron_q3n.training.loop_hooks import LoopHooks, LoopResult
from megatron_q3n.training.optimizer import decay_table
from megatron_q3n.training.state import TrainState, build_state


class Stage(Protocol):
    """One kind of training. The session calls the methods in this order, all but `conclude` on every rank."""

    loss_metric: str
    """Metric of the loss that the health monitor checks, e.g. "loss/train"."""

    def load_data(self, session: "Session") -> None:
        """Load data or prompts. Called once, before the run directory exists.

        Raises: UserError for what cannot be used, so that a refused run leaves no directory.
        """

    def build(self, session: "Session") -> list[Callback]:
        """Build what the loop needs. Called once, with `session.state` built and the run's weights not loaded yet.

        Returns: the stage's own callbacks, which are called before all others.
        """

    def introduction(self) -> list[str]:
        """Return lines on data and training for the log. Called at start and after every roll-back."""

    def train(self, hooks: LoopHooks) -> Any:
        """Train from state.step to the last step, a stop or a verdict. Called at start and after every roll-back.

        Returns: a LoopResult.
        """

    def conclude(self, result: Any) -> None:
        """Write summary.json and other results when all steps are done. Called on the leader."""


class Session:
    """One process of a training run, through all its roll-backs."""

    state: TrainState
    callbacks: CallbackList
    recorder: Recorder

    def __init__(self, config: RunConfig, run_dir: Path, stage: Stage) -> None:
        """Initialize the process groups, and use the leader's run directory on every process.

        Raises: UserError for a callback that cannot be loaded.
        """
        self.config, self.stage = config, stage
        self.started = time.monotonic()
        self.resources = ExitStack()
        self._stop = run_directory.StopRequest(config.checkpoint.time_limit_minutes, self.started)
        self._stop.listen()
        self.device = select_device(config)
        self._configured = load_callbacks(config.callbacks)
        self.group = parallel.initialize(config, self.device)
        self.run_dir = Path(self.group.from_leader(str(run_dir)))

    def run(self) -> int:
        """Train and report.

        Returns: 0 when all steps are done, 75 when stopped early with everything saved.
        Raises: UserError for bad input, and for a bad step with policy `stop`.
        """
        self.stage.load_data(self)
        with self.resources:
            path_lines = self._open_directory()
            self._build()
            result = self._attempt(path_lines, is_first=True)
            while result.verdict == "roll_back":
                result = self._attempt([])
        if result.verdict == "stop":
            raise UserError(self.monitor.stop_message())
        if self.group.is_leader:
            command = f"python -m megatron_q3n.train --resume {shlex.quote(str(self.run_dir))}"
            resume = f"\ncontinue      {command}" if result.stopped else ""
            print(f"\nrun directory {self.run_dir}\nreport        {self.run_dir / 'report.html'}{resume}")
        # a launcher ends all processes when the first one exits with 75
        self.group.barrier()
        parallel.shutdown()
        return EXIT_REQUEUE if result.stopped else 0

    def note(self, message: str) -> None:
        """Show a message and write it to logs/events.log."""
        self.recorder.note(message)

    def heartbeat(self) -> None:
        """Signal progress to the callbacks."""
        self.callbacks.heartbeat()

    def _open_directory(self) -> list[str]:
        """Lock and create the run directory, qualify kernels, write environment.json.

        Returns: verdicts and plan as lines.
        """
        config, device = self.config, self.device
        lock_lines = self._lock_directory()
        if self.group.is_leader:
            run_directory.open_directory(self.run_dir, config)
            if checkpoint.newest_in(self.run_dir) is None or InputRecord.read(self.run_dir) is None:
                InputRecord.of(config).write(self.run_dir)
        kernels = qualify(config, device.torch_device, compute_dtype(config))
        plan = make_plan(config, device.model_backend)
        if self.group.is_leader:
            run_directory.record_environment(self.run_dir, device, kernels, plan.as_tree())
        return [*lock_lines, *(f"{name}: {verdict}" for name, verdict in kernels.items()), *plan.lines()]

    def _lock_directory(self) -> list[str]:
        """Lock the run directory until this run ends. Returns: a line on a lock that was taken over.

        Raises: UserError on every process if another run uses the directory, or its checkpoints are gone.
        """
        note, refusal = None, None
        if self.group.is_leader:
            lock = RunLock(self.run_dir)
            self.resources.callback(lock.release)
            try:
                checkpoint.check_not_lost(self.run_dir)
                note = lock.acquire()
            except UserError as error:
                refusal = error
        if message := self.group.from_leader(str(refusal or "")):
            raise refusal or UserError(message)
        return [note] if note else []

    def _build(self) -> None:
        """Build the state and the callbacks. The instruments wrap the optimizer after the guard."""
        self.state = build_state(self.config, self.device, self.group)
        self.monitor = HealthMonitor(
            self.config,
            self.group,
            self.run_dir,
            self.note,
            is_cuda=self.device.is_cuda,
            model_config=self.state.models[0].config,
        )
        UpdateGuard(self.state, lambda *step: self.callbacks.before_update(*step))
        write_load = partial(run_directory.write_expert_load, self.run_dir)
        instruments = Instruments(self.state, write_load if self.group.is_leader else lambda *_: None)
        own = self.stage.build(self)
        self.callbacks = CallbackList([*own, self.monitor, instruments, *self._configured])
        # megatron-core collects garbage twice per save: 0.6 s over all imported objects, 0.02 s if these are frozen
        gc.freeze()

    def _attempt(self, path_lines: list[str], *, is_first: bool = False) -> LoopResult:
        """Train from the newest checkpoint to the end, a stop or a verdict; record and report it."""
        state, config = self.state, self.config
        self.monitor.start()
        origin = start_weights(state, self.run_dir)
        self.recorder = Recorder(
            self.run_dir,
            config,
            first_step=state.step + 1,
            total_steps=config.training.steps,
            enabled=self.group.is_leader,
        )
        status: Status = "failed"
        try:
            self._introduce([*origin, *path_lines])
            hooks = self._hooks()
            self.monitor.set_history(self._past_steps())
            if is_first:
                self.callbacks.on_run_start(RunContext(state, self.run_dir, self.note))
            self.callbacks.after_load(state.step)
            self._save_for_roll_back(hooks)
            result = self.stage.train(hooks)
            self.monitor.stop()
            self._finish(result)
            if result.verdict != "stop":
                status = "done" if state.step == config.training.steps else "stopped"
        except UserError as error:
            # before the report, which may fail, too
            run_directory.record_outcome(self.run_dir, EXIT_BAD_INPUT, str(error))
            raise
        finally:
            self.monitor.stop()
            self._close_records(status)
        return result

    def _close_records(self, status: Status) -> None:
        """Close the recorder and write the report; a failure of either must not replace the error of the training."""
        try:
            self.recorder.close(status)
            if self.group.is_leader and (self.run_dir / RECORDS_FILE).exists():
                write_report(self.run_dir)
        except (UserError, OSError) as error:
            print(f"warning: {self.run_dir}: metrics and report are incomplete: {error}", file=sys.stderr)

    def _hooks(self) -> LoopHooks:
        saver = checkpoint.Saver(self.state, self.run_dir, self.note)
        return LoopHooks(
            self.state,
            self.recorder,
            self.callbacks,
            save=saver.save,
            wait_for_save=saver.wait_for_save,
            stop_reason=self._stop.reason,
            order_batches=self.monitor.order_batches,
        )

    def _past_steps(self) -> list[tuple[float, float]]:
        """Return (loss, gradient norm) of the newest recorded steps."""
        records = jsonl.read(self.run_dir / RECORDS_FILE)[-self.config.health.spike_window_steps :]
        return [(r.get(self.stage.loss_metric, math.nan), r.get("grad_norm", math.nan)) for r in records]

    def _save_for_roll_back(self, hooks: LoopHooks) -> None:
        """Save fresh weights if a policy may return to them before the first checkpoint."""
        health = self.config.health
        if self.state.step == 0 and "roll_back" in (health.non_finite, health.loss_spike):
            hooks.save_checkpoint()
            hooks.report_saved(wait=True)

    def _finish(self, result: LoopResult) -> None:
        """Carry out how a loop ended: roll back, stop on a bad step, stop early, or conclude."""
        if result.verdict == "roll_back":
            newest = checkpoint.newest_in(self.run_dir)
            assert newest is not None
            self.callbacks.on_rollback(folders.step_of(newest))
        elif result.verdict == "stop":
            self.note(self.monitor.stop_message())
            self.callbacks.on_stop(self.monitor.stop_message())
            self.callbacks.on_run_end("failed")
        elif result.stopped:
            self.note(f"stopped at step {self.state.step}: {result.stopped}; everything is saved")
            self.callbacks.on_stop(result.stopped)
            self.callbacks.on_run_end("stopped")
        else:
            if self.group.is_leader:
                self.stage.conclude(result)
            self.callbacks.on_run_end("done")

    def _introduce(self, lines: list[str]) -> None:
        """Log what is trained on what, write logs/weight_decay.txt, and link `runs/latest` to the run."""
        if not self.group.is_leader:
            return
        run_directory.point_latest(self.run_dir)
        config, count = self.config, parameters(self.config.model)
        run_directory.write_atomically(self.run_dir / "logs/weight_decay.txt", decay_table(self.state.models, config))
        model = (
            f"model {config.model.name}: {count.total_with_mtp / 1e6:.2f} M parameters, "
            f"{count.active_with_embeddings / 1e6:.2f} M active per token; "
            f"{self.device.torch_device.type}, {self.device.model_backend}, {config.precision.compute}, "
            f"{self.group.world_size} process(es)"
        )
        self.note("\n".join([f"run directory {self.run_dir}", model, *self.stage.introduction(), *lines]))


def start_weights(state: TrainState, run_dir: Path) -> list[str]:
    """Load the weights from which the run continues: its newest good checkpoint, another run's weights, or fresh ones.

    Returns: lines for the log.
    Raises: UserError if the run is done already.
    """
    resumed = checkpoint.resume(state, run_dir)
    if resumed.checkpoint is not None:
        # without a summary, the run was killed between the last step and its conclusion
        is_concluded = (run_dir / "summary.json").is_file()
        if state.step > state.config.training.steps or (state.step == state.config.training.steps and is_concluded):
            raise UserError(
                f"{run_dir} is already at step {state.step} of {state.config.training.steps}; "
                "raise training.steps to continue it."
            )
        return [*resumed.notes, f"resumed from {resumed.checkpoint.name} at step {state.step}"]
    settings = state.config.checkpoint
    if settings.load:
        source = checkpoint.find(settings.load)
        checkpoint.load(state, source, resume=False, with_optimizer=settings.load_optimizer)
        optimizer = ", with optimizer state" if settings.load_optimizer else ""
        return [f"weights from {source}{optimizer}"]
    return [f"fresh weights, seed {state.config.training.seed}"]
