"""Sweeps: the site's settings as those of hydra-submitit-launcher, and two trials on a Slurm cluster."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from slurm.site import load_site
from slurm.sweep import launcher_settings, minutes
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, SMALL


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90),
        ("30:00", 30),
        ("1:30:00", 90),
        ("0:00:20", 1),
        ("2-00:00:00", 2880),
        ("1-12", 2160),
        ("UNLIMITED", 0),
    ],
)
def test_slurm_times_in_minutes(time: str, expected: int) -> None:
    assert minutes(time) == expected


def test_a_site_s_settings_reach_the_launcher(site: Callable[..., str]) -> None:
    """Read by Hydra's own grammar, every text is what the site says; none is a list, a sweep or an interpolation."""
    settings_of_site = load_site(site(partition="a,b", account="lab 1'2", gpus_per_node=8))
    settings = launcher_settings(settings_of_site, "UNLIMITED", Path("/a b/c'd=(e,f/setup.sh"))
    assert settings[0] == "hydra/launcher=submitit_slurm"
    parsed = OverridesParser.create().parse_overrides(settings[1:])
    assert not any(override.is_sweep_override() for override in parsed)
    tree = OmegaConf.create({override.key_or_group.rpartition(".")[2]: override.value() for override in parsed})
    values = OmegaConf.to_container(tree, resolve=True)
    assert values["partition"] == "a,b"
    assert values["account"] == "lab 1'2"
    assert (values["timeout_min"], values["gpus_per_node"]) == (0, 1)
    assert [shlex.split(line) for line in values["setup"]] == [[".", "/a b/c'd=(e,f/setup.sh"]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--time", "soon"], "--time: 'soon' is not a time limit"),
        (["--runs-dir", "a:b"], "contains ':'"),
        (["--runs-dir", "a%jb"], "contains %"),
        (["--config-name", "../x"], "is not the name of a recipe"),
    ],
)
def test_refused(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    command = [sys.executable, "-m", "slurm.sweep", "--config-name", "pretrain-tiny", *arguments, "schedule.lr=1e-3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr


@pytest.mark.slow
@pytest.mark.slurm
def test_two_trials(cluster: Cluster, site: Callable[..., str], tmp_path: Path) -> None:
    """In a folder, with a partition, a time limit and variables that need quoting."""
    parent, seen = tmp_path / "a b=c,d(e'f", tmp_path / "seen"
    changes = {
        "partition": "batch,high",
        "time": "UNLIMITED",
        "setup": [f'export SEEN="{seen} of ${{SLURM_JOB_ID%%_*}}"', 'trap \'echo "$WORDS" >> "$SEEN"\' EXIT'],
        "environment": {"WORDS": "two words"},
    }
    command = [sys.executable, "-m", "slurm.sweep", "--config-name", "pretrain-tiny"]
    done = subprocess.run(
        [*command, "--site", site(**changes), "--runs-dir", str(parent), *SMALL, "schedule.lr=1e-3,3e-3"],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = parent.glob("sweep-pretrain-tiny-*")
    assert f"--compare {shlex.quote(str(folder))}/pretrain-tiny-*" in done.stdout
    rates = set()
    for run_dir in folder.glob("pretrain-tiny-*"):
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert records[-1]["step"] == 12
        rates.add(round(records[2]["learning_rate"], 6))
    assert rates == {0.001, 0.003}
    logs = list((folder / "hydra" / ".submitit").glob("*/*_submission.sh"))
    assert logs, "the trials were Slurm jobs"
    written = [line for path in tmp_path.glob("seen of *") for line in path.read_text().splitlines()]
    assert written == ["two words"] * 2
