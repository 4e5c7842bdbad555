"""Kill saves at every kind of moment, and see after each that the run goes on where its newest checkpoint says.

A program, started by test_kill.py. It imports megatron-core once and forks a child per trial. A child resumes,
compares its whole state with what was written down when that step was first reached, and trains and saves until it
kills itself: at the n-th change of the file system it is about to make (open, rename, link, remove, …), so that the
short moments between a rename, the link and the pruning are struck as surely as the long ones; or, in some trials,
when its parent sends SIGKILL at a random time.
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
from megatron_q3n.device import choose_device, quiet_known_warnings

SAVES = 3
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "shutil.rmtree"}


def train_and_save(run_dir: Path, diary: Path, asynchronous: bool, kill_at: int | None) -> int:
    """Resume, take SAVES steps and save each; return how many changes of the file system that made."""
    from megatron_q3n import checkpoint, parallel
    from tests.checkpoint.tiny_state import fingerprint, state_of, step

    config = validate({})
    device = choose_device(config)
    settings = {"checkpoint": {"asynchronous": asynchronous, "keep_last": 2}}
    state = state_of((device, parallel.initialize(config, device)), settings)
    assert checkpoint.resume(state, run_dir).notes == [], "nothing a kill leaves may look damaged"
    known = dict(json.loads(line) for line in diary.read_text().splitlines())
    assert state.step == 0 or fingerprint(state) == known[state.step], "not the state that was saved"
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
        with diary.open("a") as file:
            file.write(json.dumps(reached[-1]) + "\n")
        saver.save()
    saver.settle(True)
    return changes


def trial(run_dir: Path, diary: Path, asynchronous: bool, kill_at: int | None) -> tuple[int, int]:
    """Run a child, return its wait status and the changes it counted."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            changes = train_and_save(run_dir, diary, asynchronous, kill_at)
            os.write(writing, str(changes).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    if kill_at is None:
        return os.waitpid(child, 0)[1], int(os.read(reading, 20) or 0)
    if kill_at < 0:  # not at a counted change: at a time
        time.sleep(-kill_at / 1000)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(reading)
    return status, 0


def check_folder(run_dir: Path) -> None:
    """Every checkpoint that has its name is whole, and there is one."""
    complete = folders.complete(run_dir)
    assert complete
    for checkpoint in folders.candidates(run_dir):
        assert integrity.damage(checkpoint, "full") == []
    latest = run_dir / "checkpoints/latest"
    assert latest.resolve().is_dir(), "the link names a checkpoint that is there"


def main() -> None:
    """Run the trials and print what was struck."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    dice = random.Random(given.seed)
    run_dir, diary = given.folder / "run", given.folder / "diary.jsonl"
    diary.touch()
    quiet_known_warnings()
    import megatron_q3n.checkpoint.writer  # before the forks: each would take seconds for it
    import tests.checkpoint.tiny_state

    assert megatron_q3n.checkpoint.writer
    assert tests.checkpoint.tiny_state
    gc.freeze()  # megatron-core collects garbage in every save: slow over all that was imported
    started = time.monotonic()
    status, changes = trial(run_dir, diary, True, None)
    seconds = time.monotonic() - started
    assert status == 0, "the first run, which nobody kills"
    killed = 0
    for number in range(given.kills):
        timed = number % 6 == 5
        kill_at = -dice.randrange(1, int(1000 * seconds)) if timed else dice.randrange(1, changes)
        status, _ = trial(run_dir, diary, number % 2 == 0, kill_at)
        assert status in (0, signal.SIGKILL), (given.seed, number, kill_at, status)
        killed += status == signal.SIGKILL
        check_folder(run_dir)
    status, _ = trial(run_dir, diary, True, None)
    assert status == 0, "the last run resumes and ends"
    check_folder(run_dir)
    print(f"seed {given.seed}: {killed} of {given.kills} killed, {changes} moments, {seconds:.1f} s a child")


if __name__ == "__main__":
    main()
