"""Pytest configuration: a reproducible environment for every test, time limits, and fixtures to start runs.

The environment has one thread (two cores are shared by many tests, and thread counts change sums), no network (wandb
offline, no Hugging Face hub), no launcher variables (a suite started inside a Slurm job must not run as rank 3), and
this checkout first on PYTHONPATH (programs started by tests import it, whichever checkout .venv is installed from). The
data cache stays at the user's location, so that the standard library corpus is tokenized once per machine.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import forked
from tests.backends import Backend, on_every_backend

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 300
SLOW_TIMEOUT_SECONDS = 1200
GIB_A_WORKER, MAX_WORKERS = 4, 8
LAUNCHER_VARIABLES = [
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
]

# at import, not in a fixture: torch reads the thread count, and wandb its mode, when first imported
os.environ.update(
    OMP_NUM_THREADS="1",
    WANDB_MODE="offline",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
)
if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not Path("/dev/nvidiactl").exists():
    # without a GPU, fused kernels are tested in Triton's interpreter; Triton's own functions choose at import
    os.environ["TRITON_INTERPRET"] = "1"
for name in [*LAUNCHER_VARIABLES, "WANDB_API_KEY"]:
    os.environ.pop(name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set each test's time limit, skip GPU tests where there is no GPU, and order long files first.

    Long files are those that start several processes or are slow: a suite in several processes ends with its last file.
    """
    long = {i.path for i in items if any(map(i.get_closest_marker, ("multiprocess", "slow")))}
    items.sort(key=lambda item: item.path not in long)
    # a GPU machine may have pytest without this plugin, and then the mark would be unknown
    limited = config.pluginmanager.hasplugin("timeout") and not config.getoption("timeout")
    for item in items:
        if limited and not item.get_closest_marker("timeout"):
            slow = item.get_closest_marker("slow") is not None
            seconds = SLOW_TIMEOUT_SECONDS if slow else TIMEOUT_SECONDS
            item.add_marker(pytest.mark.timeout(seconds))
        if item.get_closest_marker("multigpu") and _num_gpus() < 2:
            item.add_marker(pytest.mark.skip(reason="fewer than two CUDA devices (tools/test hides them)"))
        if item.get_closest_marker("gpu") and not _cuda_is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device (tools/test hides them)"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes of the suite: one per core, as far as memory allows.

    Each imports megatron-core, and its fork server does so again (tests/forked.py).
    """
    gib = psutil.virtual_memory().total / 2**30
    return max(1, min(os.cpu_count() or 1, int(gib / GIB_A_WORKER), MAX_WORKERS))


def _cuda_is_available() -> bool:
    return _num_gpus() > 0


def _num_gpus() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch  # late: takes seconds, and only GPU tests need it

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.fixture
def run_module(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `python -m megatron_q3n.train …` as a user does, in a new process (tests/forked.py).

    The working folder is the test's tmp_path, so default run directories are created there. Output is captured as text;
    the caller checks the exit status.
    """

    def run(
        *arguments: str,
        module: str = "megatron_q3n.train",
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        return forked.run(module, *arguments, cwd=tmp_path, seconds=timeout_seconds, **(environment or {}))

    return run


@pytest.fixture(autouse=True)
def fresh_process_state() -> None:
    """Reset the process-wide state: the qualified kernels, of which models that are built take their plan, and
    megatron-core's trackers, which keep the first model's number of depths, and loss scales of the last caller."""
    if registry := sys.modules.get("megatron_q3n.kernels.registry"):
        registry.clear()
    core = "megatron.core.transformer"
    if predictions := sys.modules.get(f"{core}.multi_token_prediction"):
        predictions.MTPLossLoggingHelper.tracker.clear()
        scaler = predictions.MTPLossAutoScaler
        scaler.set_loss_scale(scaler.main_loss_backward_scale.new_ones(()))
    if mixture := sys.modules.get(f"{core}.moe.moe_utils"):
        mixture.MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="session")
def alone() -> Iterator[Any]:
    """Initialize megatron-core's process groups for a run of one process, in this process.

    Returns: (Device, Parallel). megatron-core is imported late: it takes seconds, and only some tests need it.
    """
    from megatron_q3n.config import validate
    from megatron_q3n.device import quiet_known_warnings, select_device

    quiet_known_warnings()
    from megatron_q3n import parallel

    config = validate({})
    device = select_device(config)
    yield device, parallel.initialize(config, device)
    parallel.shutdown()


@pytest.fixture(params=on_every_backend())
def backend(request: pytest.FixtureRequest, alone: Any) -> Backend:
    """Run a test on every backend: torch on this machine's device, and two more where there is a GPU."""
    return replace(request.param, alone=alone)
