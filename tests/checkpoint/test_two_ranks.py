"""Two processes of one run save, verify, fall back and fail together.

One layout with two pipeline stages; resharding between any layouts: tools/checks/check_layout.py --reshard.
"""

from pathlib import Path

import pytest

from tests import forked


@pytest.mark.multiprocess
def test_two_ranks_save_fall_back_and_fail_together(tmp_path: Path) -> None:
    done = forked.run("tests.checkpoint.two_ranks", tmp_path, seconds=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("warning: checkpoint step_0000003 is damaged") == 1, "the leader alone"
