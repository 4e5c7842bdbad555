"""Training runs over forked processes, for tools/checks/check_layout.py: what a run is, its data, and how its ranks start.

megatron-core is imported once, in the process that forks; a fork costs tens of milliseconds where an
import costs eight CPU-seconds and 0.7 GiB. So nothing may compute with torch before the forks, and
there is no GPU: a fork cannot share a CUDA context. Each rank is a fresh fork, since megatron-core
keeps much in module globals. What is compared, and how closely, is the tool's business.
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

ALIGNMENT = 8  # tokens, of packed documents: 2 × the largest context parallel size checked
Step = dict[str, float]
# what is at work: the pipe a rank answers through -> its run, its process, and all processes of the run
Working = dict[Connection, tuple["Run", Any, list[Any]]]


@dataclass(frozen=True)
class Data:
    """How rows are made: the share of masked targets, and whether rows are packed documents."""

    masked: float = 0.0
    packed: bool = False


@dataclass
class Run:
    """One training run over `world_size` forked processes: where it starts, which steps it takes, where it saves."""

    name: str
    config: RunConfig
    data: Data
    first_step: int
    last_step: int
    start: Path | None = None  # None: fresh weights
    resume: bool = False  # go on from `start` with its step and optimizer
    save: dict[int, Path] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    problem: str = ""
    started: float = 0.0
    seconds: float = 0.0

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.config.world_size


def import_everything(config: RunConfig) -> None:
    """Import once what every fork needs; the shim first, since megatron-core looks at it when imported."""
    device = importlib.import_module("megatron_q3n.device")
    warnings.simplefilter("ignore")  # every rank of every run would say them again
    logging.disable(logging.WARNING)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork cannot share a CUDA context
    device.choose_device(config)
    rooms = ("parallel", "checkpoint", "data.batch", "training.state", "training.step", "instruments")
    for room in rooms:
        importlib.import_module(f"megatron_q3n.{room}")
    gc.freeze()  # a collection in a fork would touch, and so copy, every page


def launch(runs: list[Run], processes: int, folder: Path) -> None:
    """Make the runs, as many at once as `processes` allows (at least one run); they meet in `folder`."""
    waiting, working = list(runs), Working()
    fork = multiprocessing.get_context("fork")
    try:
        while waiting or working:
            while waiting and (not working or len(working) + waiting[0].world_size <= processes):
                working |= _start(waiting.pop(0), fork, folder / f"meeting-{len(waiting)}-{runs[0].name}")
            for end in wait(list(working)):
                assert isinstance(end, Connection)
                run, process, siblings = working.pop(end)
                message = _message(end, process)
                run.seconds = time.monotonic() - run.started
                if isinstance(message, list):
                    run.steps = message or run.steps
                    continue
                run.problem = run.problem or message
                for sibling in siblings:  # they would wait for the dead one
                    sibling.terminate()
    finally:
        for _, process, _ in working.values():
            process.terminate()


def _start(run: Run, fork: Any, meeting: Path) -> Working:
    """Fork the ranks of a run.

    Returns: for each, the pipe its answer comes through, and whom to end if it fails.
    """
    run.started = time.monotonic()
    started: Working = {}
    siblings: list[Any] = []
    for rank in range(run.world_size):
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_work, args=(run, rank, meeting, theirs))
        process.start()
        theirs.close()
        siblings.append(process)
        started[ours] = (run, process, siblings)
    return started


def _message(end: Connection, process: Any) -> list[Step] | str:
    try:
        message = end.recv()
    except EOFError:
        message = "ended without a word"
    process.join()
    return message if isinstance(message, list) else f"{message} (exit {process.exitcode})"


def _work(run: Run, rank: int, meeting: Path, answer: Connection) -> None:
    """Be one rank of a run, in a process of its own, and send back its steps or what went wrong."""
    try:
        answer.send(_train(run, rank, meeting))
    except BaseException:
        answer.send(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # not politely: leaving a group with calls outstanding can wait for its timeout


def _train(run: Run, rank: int, meeting: Path) -> list[Step]:
    import torch  # imported long ago, in the parent; named here to keep the parser's start quick

    from megatron_q3n import checkpoint, parallel
    from megatron_q3n.device import choose_device
    from megatron_q3n.instruments import Instruments
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    device = choose_device(run.config)
    store = torch.distributed.FileStore(str(meeting), run.world_size)
    group = parallel.initialize(run.config, device, parallel.Meeting(store, rank, run.world_size))
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
            own = list(batches(run, step, group))
            instruments.before_step()
            report = train_step(state, own)
            steps.append(_flat(report) | _measured(instruments.after_step(own, report)))
    parallel.shutdown()
    return steps if rank == 0 else []


def _load(state: Any, start: Path, resume: bool) -> None:
    """Load weights, and to resume everything; then the master weights must be the weights, bit for bit.

    Training alone would not tell: the first step behind a load overwrites weights with master weights.
    """
    from megatron_q3n import checkpoint  # as in _train

    checkpoint.load(state, start, resume=False, with_optimizer=False)
    if not resume:
        return
    weights = [weight.detach().clone() for model in state.models for weight in model.parameters()]
    checkpoint.load(state, start, resume=True)
    for chunk in state.chunks:
        chunk.start_param_sync(force_sync=True)  # every rank's share of the master weights
    named = [pair for model in state.models for pair in model.named_parameters()]
    wrong = [name for (name, master), weight in zip(named, weights) if not master.equal(weight)]
    assert not wrong, f"saved weights differ from the master weights saved beside them: {wrong}"


def _flat(report: Any) -> Step:
    step = {"loss": report.loss, "grad norm": report.grad_norm}
    step |= {f"mtp {depth}": loss for depth, loss in enumerate(report.mtp_losses, 1)}
    return step | {f"balance {name}": loss for name, loss in report.balance_losses.items()}


def _measured(values: Step) -> Step:
    return {f"inside {name}": value for name, value in values.items()}


def batches(run: Run, step: int, group: Any) -> Iterator[Any]:
    """Make this rank's micro-batches of a step: random walks, so that there is something to learn."""
    import torch  # as in _train

    from megatron_q3n.data.batch import batch_of_documents, batch_of_rows

    training, vocab = run.config.training, run.config.model.vocab_size
    rows, length, size = (training.global_batch_size, training.sequence_length, training.micro_batch_size)
    random = torch.Generator().manual_seed(step)
    jumps = torch.randint(1, 4, (rows, length + 1), generator=random)
    jumps[:, 0] = torch.randint(0, vocab, (rows,), generator=random)
    tokens_RT = jumps.cumsum(1) % vocab
    # each row with a share of its own, so that micro-batches count different numbers of tokens
    shares = torch.rand(rows, 1, generator=random) * 2 * run.data.masked
    mask_RT = (torch.rand(rows, length, generator=random) >= shares).float()
    ends_RT = torch.rand(rows, length + 1, generator=random) < 4 / length
    if run.data.packed:
        tokens_RT = torch.where(ends_RT, 0, tokens_RT.clamp(min=1))
    for first in range(group.data_rank * size, rows, group.data_size * size):
        part = slice(first, first + size)
        inputs, labels = tokens_RT[part, :-1].contiguous(), tokens_RT[part, 1:].contiguous()
        if run.data.packed:
            yield batch_of_documents(inputs, labels, mask_RT[part], 0, ALIGNMENT)
        else:
            yield batch_of_rows(inputs, labels, mask_RT[part].contiguous())
