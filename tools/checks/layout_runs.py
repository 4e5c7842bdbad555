"""Training runs over forked processes, for tools/checks/check_layout.py: runs, data, and the start of the ranks.

megatron-core is imported once, in the process that forks: a fork costs tens of milliseconds, an import eight
CPU-seconds and 0.7 GiB. So torch must not compute before the forks, and there is no GPU: a fork cannot share a CUDA
context. Each rank is a new fork, since megatron-core keeps state in module globals.
"""

import gc
import importlib
import logging
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunConfig

# tokens; of packed documents: 2 × the largest context parallel size checked
ALIGNMENT = 8
Step = dict[str, float]
# pipe of a running rank -> its run, its process, and all processes of the run
Running = dict[Connection, tuple["Run", Any, list[Any]]]


@dataclass(frozen=True)
class Data:
    """Training data: the share of masked targets, and whether rows are packed documents."""

    masked: float = 0.0
    packed: bool = False


@dataclass
class Run:
    """One training run over `world_size` forked processes: its start, its steps, and its saves."""

    name: str
    config: RunConfig
    data: Data
    first_step: int
    last_step: int
    # None: initial weights
    start: Path | None = None
    # restore step and optimizer of `start` too
    resume: bool = False
    save: dict[int, Path] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    problem: str = ""
    started: float = 0.0
    seconds: float = 0.0

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.config.world_size


def import_everything(config: RunConfig) -> None:
    """Import the forks' modules once; the CPU shim first, since megatron-core needs it during its import."""
    device = importlib.import_module("megatron_q3n.device")
    # every rank of every run would repeat them
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # a fork cannot share a CUDA context
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device.select_device(config)
    modules = ("parallel", "checkpoint", "data.batch", "training.state", "training.step", "instruments")
    for module in modules:
        importlib.import_module(f"megatron_q3n.{module}")
    # a garbage collection in a fork would write to, and so copy, every page
    gc.freeze()


def launch(runs: list[Run], processes: int, folder: Path) -> None:
    """Execute the runs, as many at once as `processes` allows (at least one); `folder` holds their rendezvous files."""
    waiting, running = list(runs), Running()
    fork = multiprocessing.get_context("fork")
    try:
        while waiting or running:
            while waiting and (not running or len(running) + waiting[0].world_size <= processes):
                running |= _start(waiting.pop(0), fork, folder / f"rendezvous-{len(waiting)}-{runs[0].name}")
            for end in wait(list(running)):
                assert isinstance(end, Connection)
                run, process, siblings = running.pop(end)
                message = _message(end, process)
                run.seconds = time.monotonic() - run.started
                if isinstance(message, list):
                    run.steps = message or run.steps
                    continue
                run.problem = run.problem or message
                # they would wait for the failed one
                for sibling in siblings:
                    sibling.terminate()
    finally:
        for _, process, _ in running.values():
            process.terminate()


def _start(run: Run, fork: Any, rendezvous: Path) -> Running:
    """Fork the ranks of a run.

    Returns: for each rank the pipe of its result, with the processes to end if it fails.
    """
    run.started = time.monotonic()
    started: Running = {}
    siblings: list[Any] = []
    for rank in range(run.world_size):
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_work, args=(run, rank, rendezvous, theirs))
        process.start()
        theirs.close()
        siblings.append(process)
        started[ours] = (run, process, siblings)
    return started


def _message(end: Connection, process: Any) -> list[Step] | str:
    try:
        message = end.recv()
    except EOFError:
        message = "ended without a result"
    process.join()
    return message if isinstance(message, list) else f"{message} (exit {process.exitcode})"


def _work(run: Run, rank: int, rendezvous: Path, answer: Connection) -> None:
    """Execute one rank of a run in this process, and send its steps or its error."""
    try:
        answer.send(_train(run, rank, rendezvous))
    except BaseException:
        answer.send(f"rank {rank}:\n{traceback.format_exc()}")
        # a normal exit can wait for the timeout of pending collectives
        os._exit(1)


def _train(run: Run, rank: int, rendezvous: Path) -> list[Step]:
    import torch  # late: imported by the parent already; the command line must start fast

    from megatron_q3n import checkpoint, parallel
    from megatron_q3n.device import select_device
    from megatron_q3n.instruments import Instruments
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    device = select_device(run.config)
    store = torch.distributed.FileStore(str(rendezvous), run.world_size)
    group = parallel.initialize(run.config, device, parallel.Rendezvous(store, rank, run.world_size))
    state = build_state(run.config, device, group)
    if run.start:
        _load(state, checkpoint.find(run.start), run.resume)
    assert state.step == run.first_step
    instruments = Instruments(state)
    steps = []
    for step in range(run.first_step, run.last_step + 1):
        if step in run.save:
            checkpoint.save(state, run.save[step])
        if step < run.last_step:
            rank_batches = list(batches(run, step, group))
            instruments.before_step(step + 1)
            report = train_step(state, rank_batches)
            steps.append(_flat(report) | _measured(instruments.measure(report)))
    parallel.shutdown()
    return steps if rank == 0 else []


def _load(state: Any, start: Path, resume: bool) -> None:
    """Load weights, and the whole state to resume; then check that the master weights equal the weights bit for bit.

    Training does not detect a difference: the first step after a load overwrites weights with master weights.
    """
    from megatron_q3n import checkpoint  # as in _train

    checkpoint.load(state, start, resume=False, with_optimizer=False)
    if not resume:
        return
    weights = [weight.detach().clone() for model in state.models for weight in model.parameters()]
    checkpoint.load(state, start, resume=True)
    for chunk in state.chunks:
        # gathers every rank's share of the master weights
        chunk.start_param_sync(force_sync=True)
    named = [pair for model in state.models for pair in model.named_parameters()]
    wrong = [name for (name, master), weight in zip(named, weights) if not master.equal(weight)]
    assert not wrong, f"saved weights differ from the saved master weights: {wrong}"


def _flat(report: Any) -> Step:
    step = {"loss": report.loss, "grad norm": report.grad_norm}
    step |= {f"mtp {depth}": loss for depth, loss in enumerate(report.mtp_losses, 1)}
    return step | {f"balance {name}": loss for name, loss in report.balance_losses.items()}


def _measured(values: Step) -> Step:
    return {f"inside {name}": value for name, value in values.items()}


def batches(run: Run, step: int, group: Any) -> Iterator[Any]:
    """Yield this rank's micro-batches of a step: random walks, which can be learned."""
    import torch  # as in _train

    from megatron_q3n.data.batch import causal_batch, packed_batch

    training, vocab = run.config.training, run.config.model.vocab_size
    rows, length, size = (training.global_batch_size, training.sequence_length, training.micro_batch_size)
    random = torch.Generator().manual_seed(step)
    jumps = torch.randint(1, 4, (rows, length + 1), generator=random)
    jumps[:, 0] = torch.randint(0, vocab, (rows,), generator=random)
    tokens_RT = jumps.cumsum(1) % vocab
    # a different share in each row, so that micro-batches have different numbers of tokens
    shares = torch.rand(rows, 1, generator=random) * 2 * run.data.masked
    mask_RT = (torch.rand(rows, length, generator=random) >= shares).float()
    ends_RT = torch.rand(rows, length + 1, generator=random) < 4 / length
    if run.data.packed:
        tokens_RT = torch.where(ends_RT, 0, tokens_RT.clamp(min=1))
    for first in range(group.data_rank * size, rows, group.data_size * size):
        part = slice(first, first + size)
        inputs, labels = tokens_RT[part, :-1].contiguous(), tokens_RT[part, 1:].contiguous()
        if run.data.packed:
            yield packed_batch(inputs, labels, mask_RT[part], 0, ALIGNMENT)
        else:
            yield causal_batch(inputs, labels, mask_RT[part].contiguous())
