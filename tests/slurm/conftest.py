"""Fixtures: one Slurm cluster per test process, if the Slurm programs are installed; clusters can coexist."""

import json
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.runs import SITE, train_without_slurm

NOT_INSTALLED = "Slurm is not installed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report all tests skipped for lack of Slurm at one location, so that pytest summarizes them in one line."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and NOT_INSTALLED in report.longrepr[2]:
        report.longrepr = (__file__, 0, report.longrepr[2])
    return report


@pytest.fixture
def cluster(one_cluster: Cluster) -> Iterator[Cluster]:
    """Yield the cluster, and cancel the jobs that a failed test leaves in the queue."""
    yield one_cluster
    one_cluster.cancel_all()


@pytest.fixture(scope="session")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start Slurm; without its programs skip the test, or in CI fail."""
    if missing := missing_programs():
        reason = f"{NOT_INSTALLED} (no {', '.join(missing)}): apt-get install slurm-wlm munge"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    started = Cluster(tmp_path_factory.mktemp("slurm"), first_job=1 + 1000 * worker)
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a site file for the cluster, with changed settings, and returns its path."""

    def write(**changes: object) -> str:
        path = tmp_path / "site.yaml"
        path.write_text(json.dumps(SITE | changes))
        return str(path)

    return write


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the small run in one process, without Slurm and without interruption."""
    return train_without_slurm(tmp_path_factory.mktemp("train_without_slurm") / "run")
