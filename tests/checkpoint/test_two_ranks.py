"""Processes that share a checkpoint save, verify, fall back and fail as one.

One layout, two pipeline stages; from any layout to any other: tools/check_layout.py --reshard.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.multiprocess
def test_two_ranks_save_fall_back_and_fail_together(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.two_ranks", str(tmp_path)],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("warning: checkpoint step_0000003 is damaged") == 1, "the leader alone"
