"""Sweeps: the site's settings as those of hydra-submitit-launcher, and two trials on a Slurm cluster."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.site import load_site
from slurm.sweep import launcher_settings, minutes
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, SMALL


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("30:00", 30), ("1:30:00", 90), ("0:00:20", 1), ("2-00:00:00", 2880), ("1-12", 2160)],
)
def test_slurm_times_in_minutes(time: str, expected: int) -> None:
    assert minutes(time) == expected


def test_a_site_s_settings_reach_the_launcher(site: Callable[..., str]) -> None:
    settings_of_site = load_site(site(account="lab", gpus_per_node=8, setup=["module load cuda"]))
    settings = launcher_settings(settings_of_site, "1:00:00")
    assert settings[0] == "hydra/launcher=submitit_slurm"
    for expected in ("account=lab", "partition=batch", "timeout_min=60", "gpus_per_node=1"):
        assert f"hydra.launcher.{expected}" in settings
    assert "hydra.launcher.setup=['module load cuda']" in settings


@pytest.mark.slow
@pytest.mark.slurm
def test_two_trials(cluster: Cluster, site: Callable[..., str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slurm.sweep", "--config-name", "pretrain-tiny"]
    done = subprocess.run(
        [*command, "--site", site(), "--runs-dir", str(tmp_path), *SMALL, "schedule.lr=1e-3,3e-3"],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.glob("sweep-pretrain-tiny-*")
    rates = set()
    for run_dir in folder.glob("pretrain-tiny-*"):
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == 12
        rates.add(round(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[2])["learning_rate"], 6))
    assert rates == {0.001, 0.003}
    logs = list((folder / "hydra" / ".submitit").glob("*/*_submission.sh"))
    assert logs, "the trials were Slurm jobs"
