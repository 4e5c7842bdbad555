"""SIGKILL at any moment of a save, of its renames and of its pruning leaves a checkpoint that loads bit for bit.

One process; a kill of one rank among several kills the run, and is not covered separately.
"""

from pathlib import Path

from tests import forked


def test_killed_saves_leave_a_good_checkpoint(tmp_path: Path) -> None:
    done = forked.run("tests.checkpoint.killed_saves", tmp_path, "--kills=24", seconds=280)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    assert int(done.stdout.split()[2]) >= 18, done.stdout
