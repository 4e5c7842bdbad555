"""Where Slurm is not installed its tests skip with one line; in CI that is a failure.

Slurm's programs are sought under names that nobody has; the rest is the suite as it is.
"""

import os
import subprocess
import sys

import pytest

from tests.slurm.runs import ROOT

SUITE = """
import sys, pytest
from tests.slurm import cluster
cluster.PROGRAMS = ("slurm-that-nobody-has",)
chosen = ["tests/slurm/test_interruptions.py", "tests/slurm/test_layout.py"]
sys.exit(pytest.main([*chosen, "-q", "-m", "slurm"]))
"""


@pytest.mark.parametrize("in_ci", [False, True])
def test_tests_on_slurm_skip_with_one_line_and_in_ci_fail(in_ci: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-c", SUITE],
        cwd=ROOT,
        env=environment | ({"CI": "true"} if in_ci else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("SKIPPED", "ERROR"))]
    assert all("apt-get install slurm-wlm munge" in line or in_ci for line in said)
    if in_ci:
        assert done.returncode == 1, done.stdout
        assert "apt-get install slurm-wlm munge" in done.stdout
        assert "passed" not in done.stdout.splitlines()[-1]
    else:
        assert done.returncode == 0, done.stdout
        assert len(said) == 1, done.stdout
