"""Without Slurm its tests are skipped with one line; in CI this is a failure.

Missing programs are simulated by a program name that does not exist; the rest of the suite is unchanged.
"""

import os
import subprocess
import sys

import pytest

from tests.slurm.runs import ROOT

SUITE = """
import sys, pytest
from tests.slurm import cluster
cluster.PROGRAMS = ("slurm-not-installed",)
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
    lines = [line for line in done.stdout.splitlines() if line.startswith(("SKIPPED", "ERROR"))]
    assert all("apt-get install slurm-wlm munge" in line or in_ci for line in lines)
    if in_ci:
        assert done.returncode == 1, done.stdout
        assert "apt-get install slurm-wlm munge" in done.stdout
        assert "passed" not in done.stdout.splitlines()[-1]
    else:
        assert done.returncode == 0, done.stdout
        assert len(lines) == 1, done.stdout
