"""Program of test_kill.py: kill saves at random moments, and check after each that the run resumes correctly.

It imports megatron-core once and forks a child per trial. A child resumes, compares its whole state with the record of
when that step was first reached, and trains and saves until it kills itself: before the n-th change of the file system
(open, rename, link, remove, …), so that the short intervals between rename, link and pruning are hit as often as the
long ones; or, in some trials, its parent sends SIGKILL at a random time.
"""

import argparse
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from megatron_q3n.checkpoint import folders, integrity
from megatron_q3n.config import validate
from megatron_q3n.device import quiet_known_warnings, select_device

SAVES = 3
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "shutil.rmtree"}


def train_and_save(run_dir: Path, record: Path, asynchronous: bool, kill_at: int | None) -> int:
    """Resume, take SAVES steps and save each; return the number of changes of the file system."""
    from megatron_q3n import checkpoint, parallel
    from tests.checkpoint.tiny_state import fingerprint, state_of, step

    config = validate({})
    device = select_device(config)
    settings = {"checkpoint": {"asynchronous": asynchronous, "keep_last": 2}}
    state = state_of((device, parallel.initialize(config, device)), settings)
    assert checkpoint.resume(state, run_dir).notes == [], "the remains of a kill must not count as damage"
    recorded = dict(json.loads(line) for line in record.read_text().splitlines())
    assert state.step == 0 or fingerprint(state) == recorded[state.step], "not the state that was saved"
    changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event in CHANGES and str(run_dir) in str(arguments):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    saver = checkpoint.Saver(state, run_dir)
    reached = []
    sys.addaudithook(count)
    for _ in range(SAVES):
        step(state)
        reached.append([state.step, fingerprint(state)])
        with record.open("a") as file:
            file.write(json.dumps(reached[-1]) + "\n")
        saver.save()
    saver.wait_for_save(True)
    return changes


def trial(run_dir: Path, record: Path, asynchronous: bool, kill_at: int | None) -> tuple[int, int]:
    """Run a child; return its wait status and the changes that it counted."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            changes = train_and_save(run_dir, record, asynchronous, kill_at)
            os.write(writing, str(changes).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    if kill_at is None:
        return os.waitpid(child, 0)[1], int(os.read(reading, 20) or 0)
    # negative: a time in milliseconds instead of a counted change
    if kill_at < 0:
        time.sleep(-kill_at / 1000)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(reading)
    return status, 0


def check_folder(run_dir: Path) -> None:
    """Check that there is a complete checkpoint, and that each is intact."""
    complete = folders.complete_checkpoints(run_dir)
    assert complete
    for checkpoint in folders.candidates(run_dir):
        assert integrity.find_damage(checkpoint, "full") == []
    latest = run_dir / "checkpoints/latest"
    assert latest.resolve().is_dir(), "the link names an existing checkpoint"


def main() -> None:
    """Run the trials and print their number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    run_dir, record = arguments.folder / "run", arguments.folder / "record.jsonl"
    record.touch()
    quiet_known_warnings()
    # before the forks: each would import for seconds
    import megatron_q3n.checkpoint.writer
    import tests.checkpoint.tiny_state

    assert megatron_q3n.checkpoint.writer
    assert tests.checkpoint.tiny_state
    # megatron-core collects garbage in every save: slow over all imported modules
    gc.freeze()
    started = time.monotonic()
    status, changes = trial(run_dir, record, True, None)
    seconds = time.monotonic() - started
    assert status == 0, "the first run, which is not killed"
    killed = 0
    for number in range(arguments.kills):
        timed = number % 6 == 5
        kill_at = -dice.randrange(1, int(1000 * seconds)) if timed else dice.randrange(1, changes)
        status, _ = trial(run_dir, record, number % 2 == 0, kill_at)
        assert status in (0, signal.SIGKILL), (arguments.seed, number, kill_at, status)
        killed += status == signal.SIGKILL
        check_folder(run_dir)
    status, _ = trial(run_dir, record, True, None)
    assert status == 0, "the last run resumes and ends"
    check_folder(run_dir)
    print(f"seed {arguments.seed}: {killed} of {arguments.kills} killed, {changes} moments, {seconds:.1f} s a child")


if __name__ == "__main__":
    main()
