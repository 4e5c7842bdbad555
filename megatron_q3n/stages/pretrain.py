"""Pretraining, continued pretraining and longer context: from a configuration to a trained model and its report."""

import gc
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_q3n import checkpoint, parallel, run_directory
from megatron_q3n.checkpoint import folders
from megatron_q3n.config import EXIT_REQUEUE, RunConfig, UserError
from megatron_q3n.config.sizes import parameters
from megatron_q3n.data.bigram import witten_bell_bits_per_byte
from megatron_q3n.data.pretrain import PretrainData, build_pretrain_data
from megatron_q3n.device import choose_device, measured_matmul_flops
from megatron_q3n.health.watch import Watch
from megatron_q3n.instruments import Instruments
from megatron_q3n.kernels.startup.qualification import qualify
from megatron_q3n.metrics import jsonl
from megatron_q3n.metrics.meters import throughput
from megatron_q3n.metrics.recorder import RECORDS_FILE, Recorder, Status
from megatron_q3n.metrics.report import write_report
from megatron_q3n.model.build import compute_dtype
from megatron_q3n.stages.samples import sample_texts, share_of_python_lines
from megatron_q3n.training import step_graph
from megatron_q3n.training.fit import FitResult, Pace, fit
from megatron_q3n.training.guard import UpdateGuard
from megatron_q3n.training.optimizer import decay_table
from megatron_q3n.training.state import TrainState, build_state


def run(config: RunConfig, run_dir: Path, build_data: Callable[..., Any] = build_pretrain_data) -> int:
    """Train and report. `build_data` makes the rows; fine-tuning brings its own.

    Returns: 0 when all steps are done, 75 when stopped early with everything saved.
    """
    started = time.monotonic()
    stop = run_directory.StopRequest(config.checkpoint.time_limit_minutes, started)
    stop.listen()
    device = choose_device(config)
    group = parallel.initialize(config, device)
    run_dir = Path(group.from_leader(str(run_dir)))
    if config.checkpoint.load:
        checkpoint.find(config.checkpoint.load)
    if checkpoint.newest_in(run_dir):
        run_directory.check_same_data(run_dir, config)
    data = build_data(config, is_leader=group.is_leader, barrier=group.barrier)
    if group.is_leader:
        run_directory.open_directory(run_dir, config)
    kernels = qualify(config, device.torch_device, compute_dtype(config))
    if device.is_cuda:
        kernels["step as one CUDA graph"] = step_graph.verdict(config)
    if group.is_leader:
        run_directory.record_environment(run_dir, device, kernels)
    state = build_state(config, device, group)
    hooks = state.models[0].config
    watch = Watch(config, group, run_dir, is_cuda=device.is_cuda, hooks=hooks)
    UpdateGuard(state, watch.admit)
    keep_load = partial(run_directory.write_expert_load, run_dir)
    instruments = Instruments(state, keep_load if group.is_leader else lambda *_: None)
    gc.freeze()  # megatron-core collects garbage twice a save: 0.6 s over all that imports left, else 0.02 s
    session = partial(_session, state, data, run_dir, watch, instruments, stop.reason, started)
    result = session([f"{name}: {verdict}" for name, verdict in kernels.items()])
    while result.verdict == "roll_back":
        result = session([])
    if result.verdict == "stop":
        raise UserError(watch.why_stopped())
    if group.is_leader:
        resume = f"\ncontinue      python -m megatron_q3n.train --resume {run_dir}" if result.stopped else ""
        print(f"\nrun directory {run_dir}\nreport        {run_dir / 'report.html'}{resume}")
    group.barrier()  # a launcher ends everybody when the first one leaves with 75
    parallel.shutdown()
    return EXIT_REQUEUE if result.stopped else 0


def _session(
    state: TrainState,
    data: PretrainData,
    run_dir: Path,
    watch: Watch,
    instruments: Instruments,
    stop_reason: Callable[[], str | None],
    started: float,
    lines: list[str],
) -> FitResult:
    """Train from the newest checkpoint to the end, a stop, or a bad step that ends it; record and report it."""
    group, config = state.parallel, state.config
    watch.start()
    origin = start_weights(state, run_dir)
    recorder = Recorder(
        run_dir, config, first_step=state.step + 1, total_steps=config.training.steps, enabled=group.is_leader
    )
    status: Status = "failed"
    try:
        _introduce(state, data, recorder, run_dir, [*origin, *lines])
        saver = checkpoint.Saver(state, run_dir, recorder.note)
        watch.begin(_past_steps(run_dir, config), recorder.note)
        _save_what_to_roll_back_to(state, saver)
        pace = Pace(
            save=saver.save,
            settle=saver.settle,
            stop_reason=stop_reason,
            throughput=throughput,
            peak_flops=measured_matmul_flops(state.device, group.world_size),
            watch=watch,
            instruments=instruments,
        )
        result = fit(state, data, recorder, pace)
        watch.stop()
        if result.verdict == "roll_back":
            newest = checkpoint.newest_in(run_dir)
            assert newest is not None
            watch.leave_out(folders.step_of(newest))
        elif result.verdict == "stop":
            recorder.note(watch.why_stopped())
            return result
        elif result.stopped:
            recorder.note(f"stopped at step {state.step}: {result.stopped}; everything is saved")
        elif group.is_leader:
            if result.validation_loss is None:
                _recall_validation(result, run_dir)
            _conclude(state, data, result, run_dir, recorder, time.monotonic() - started)
        status = "done" if state.step == config.training.steps else "stopped"
    finally:
        watch.stop()
        recorder.close(status)
        if group.is_leader and (run_dir / "metrics.jsonl").exists():
            write_report(run_dir)
    return result


def _recall_validation(result: FitResult, run_dir: Path) -> None:
    """Take the last step's validation from the records: an earlier process took that step and was killed then."""
    last = jsonl.read(run_dir / RECORDS_FILE)[-1]
    result.validation_loss = last.get("loss/validation")
    result.bits_per_byte = last.get("bits_per_byte/validation")


def _past_steps(run_dir: Path, config: RunConfig) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of the newest recorded steps, which a new one is judged by."""
    records = jsonl.read(run_dir / RECORDS_FILE)[-config.health.spike_window_steps :]
    return [(r.get("loss/train", math.nan), r.get("grad_norm", math.nan)) for r in records]


def _save_what_to_roll_back_to(state: TrainState, saver: Any) -> None:
    """Save the beginning of a run that may want to go back before its first checkpoint."""
    health = state.config.health
    if state.step == 0 and "roll_back" in (health.non_finite, health.loss_spike):
        saver.save()
        saver.settle(True)


def start_weights(state: TrainState, run_dir: Path) -> list[str]:
    """Put weights where the run should begin: its own newest good checkpoint, another run's weights, or the
    fresh init. Return what to tell the user of it."""
    resumed = checkpoint.resume(state, run_dir)
    if resumed.checkpoint is not None:
        concluded = (run_dir / "summary.json").is_file()  # else killed between the last step and here
        if state.step > state.config.training.steps or (state.step == state.config.training.steps and concluded):
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


def _introduce(state: TrainState, data: PretrainData, recorder: Recorder, run_dir: Path, lines: list[str]) -> None:
    """Say what is about to happen, and leave the weight-decay table in the logs."""
    if not state.parallel.is_leader:
        return
    config, count = state.config, parameters(state.config.model)
    (run_dir / "logs" / "weight_decay.txt").write_text(decay_table(state.models, config))
    training = config.training
    tokens = training.steps * config.tokens_per_step
    recorder.note(
        "\n".join(
            [
                f"run directory {run_dir}",
                f"model {config.model.name}: {count.total_with_mtp / 1e6:.2f} M parameters, "
                f"{count.active_with_embeddings / 1e6:.2f} M active per token; "
                f"{state.device.torch_device.type}, {state.device.model_backend}, {config.precision.compute}, "
                f"{state.parallel.world_size} process(es)",
                f"data {_data_line(data)}",
                f"training {training.steps} steps × {config.tokens_per_step:,} tokens = {tokens:,}",
                *lines,
            ]
        )
    )


def _data_line(data: PretrainData) -> str:
    """Say in one line what is trained on."""
    facts = data.describe()
    parts = ", ".join(f"{p['path']} ({p['tokens']:,} tokens, {p['epochs']:.2f} passes)" for p in facts["train"])
    return f"{parts}; vocabulary {facts['tokenizer']['vocab_size']}"


def _conclude(
    state: TrainState, data: PretrainData, result: FitResult, run_dir: Path, recorder: Recorder, seconds: float
) -> None:
    """Sample, compare with the bigram, and leave the results for the report."""
    config = state.config
    count = parameters(config.model)
    summary = {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": seconds,
        "parameters": count.total_with_mtp,
        "active_parameters": count.active_with_embeddings,
        "validation_loss": result.validation_loss,
        "bits_per_byte": result.bits_per_byte,
    }
    if result.expert_load:
        run_directory.write_expert_load(run_dir, state.step, result.expert_load)
    samples = []
    if config.parallel.model_parallel_size == 1 and config.parallel.expert_model_parallel_size == 1:
        samples = sample_texts(state.models[0], data.tokenizer, config.samples, config.training.seed)
    else:
        recorder.note("no samples: generation needs the whole model in one process for now")
    run_directory.write_json(run_dir / "samples.json", samples)
    if samples and config.data.source == "stdlib":
        good, lines = share_of_python_lines(samples)
        summary |= {"python_lines_accepted": good, "python_lines": lines}
        recorder.note(f"{good} of {lines} sampled lines of 20 characters or more pass Python's tokenizer")
    if config.validation.bigram_baseline and result.bits_per_byte is not None:
        summary |= _compare_with_bigram(state, data, result.bits_per_byte, run_dir, recorder)
    run_directory.write_json(run_dir / "summary.json", summary)


def _compare_with_bigram(
    state: TrainState, data: PretrainData, ours: float, run_dir: Path, recorder: Recorder
) -> dict[str, float]:
    """Fit the bigram on exactly the tokens this run trained on, and measure it on the same validation tokens."""
    bigram = witten_bell_bits_per_byte(
        data.train_sample_tokens(state.step * state.config.training.global_batch_size),
        data.validation_sample_tokens(),
        data.tokenizer.vocab_size,
        data.tokenizer.token_num_bytes(),
    )
    name = "Witten-Bell bigram on the same tokens"
    baseline = {"name": name, "bits_per_byte": bigram.bits_per_byte, "bits_per_token": bigram.bits_per_token}
    run_directory.write_json(run_dir / "baseline.json", baseline)
    below = 100 * (1 - ours / bigram.bits_per_byte)
    assert math.isfinite(below)
    recorder.note(
        f"validation {ours:.4f} bits per byte, {abs(below):.1f} % {'below' if below > 0 else 'above'} "
        f"the {name} ({bigram.bits_per_byte:.4f})"
    )
    return {"bigram_bits_per_byte": bigram.bits_per_byte, "percent_below_bigram": below}
