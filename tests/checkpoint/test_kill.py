"""SIGKILL at any moment of a save, of its renames and of its pruning leaves a checkpoint that loads bit for bit.

One process; a kill of one rank among several is a kill of the run, and not covered apart.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_killed_saves_leave_a_good_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.killed_saves", str(tmp_path), "--kills=24"],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    assert int(done.stdout.split()[2]) >= 18, done.stdout
