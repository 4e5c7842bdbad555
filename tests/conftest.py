"""What every test stands on: an environment that does not depend on who runs it, and one way to start a run.

One thread each (two cores are shared by many tests, and thread counts change sums), no network (wandb offline, no
hub), no launcher's variables (a suite started inside a Slurm job must not think it is rank 3), and a time limit per
test. The data cache stays where the user has it, so that the standard library corpus is tokenised once per machine.
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
from tests.backends import Backend, on_every_backend, qualify_kernels

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 300
SLOW_TIMEOUT_SECONDS = 1200
GIB_A_WORKER, MAX_WORKERS = 4, 8
LAUNCHER_VARIABLES = [
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
]

# At import, not in a fixture: torch reads the thread count, and wandb its mode, when first imported.
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
    # without a GPU, fused kernels are tested in Triton's interpreter; its own library decides when it is imported
    os.environ["TRITON_INTERPRET"] = "1"
for name in [*LAUNCHER_VARIABLES, "WANDB_API_KEY"]:
    os.environ.pop(name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test its time limit, skip GPU tests where there is no GPU, and put long files first.

    Long are those that start several processes or are slow: a suite in several processes ends when the last file does.
    """
    long = {i.path for i in items if any(map(i.get_closest_marker, ("multiprocess", "slow")))}
    items.sort(key=lambda item: item.path not in long)
    # A GPU machine may have pytest without the plugin, and then the mark would be unknown.
    limited = config.pluginmanager.hasplugin("timeout") and not config.getoption("timeout")
    for item in items:
        if limited and not item.get_closest_marker("timeout"):
            slow = item.get_closest_marker("slow") is not None
            seconds = SLOW_TIMEOUT_SECONDS if slow else TIMEOUT_SECONDS
            item.add_marker(pytest.mark.timeout(seconds))
        if item.get_closest_marker("gpu") and not _cuda_is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device (tools/test hides them)"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes share the suite: one a core, as far as memory allows. Each imports megatron-core for
    itself and forks programs that have it (forked.py)."""
    gib = psutil.virtual_memory().total / 2**30
    return max(1, min(os.cpu_count() or 1, int(gib / GIB_A_WORKER), MAX_WORKERS))


def _cuda_is_available() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch  # late: seconds that a selection without GPU tests need not spend

    return torch.cuda.is_available()


@pytest.fixture
def run_module(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m megatron_q3n.train …` as a user does, in a process of its own (see forked.py).

    The call's working folder is the test's tmp_path, so that default run directories land there. Output is captured
    as text and the exit status is the caller's to check.
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
    """Drop what megatron-core keeps for the whole process: its trackers keep the first model's number
    of depths, its loss scales the last caller's numbers and shapes."""
    core = "megatron.core.transformer"
    if predictions := sys.modules.get(f"{core}.multi_token_prediction"):
        predictions.MTPLossLoggingHelper.tracker.clear()
        scaler = predictions.MTPLossAutoScaler
        scaler.set_loss_scale(scaler.main_loss_backward_scale.new_ones(()))
    if mixture := sys.modules.get(f"{core}.moe.moe_utils"):
        mixture.MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="session")
def alone() -> Iterator[Any]:
    """Join megatron-core's process groups as a run of one process, in this process.

    Returns: (Device, Parallel). Imports megatron-core late: it takes seconds, and only some tests need it.
    """
    from megatron_q3n.config import validate
    from megatron_q3n.device import choose_device, quiet_known_warnings

    quiet_known_warnings()
    from megatron_q3n import parallel

    config = validate({})
    device = choose_device(config)
    yield device, parallel.initialize(config, device)
    parallel.shutdown()


@pytest.fixture(params=on_every_backend())
def backend(request: pytest.FixtureRequest, alone: Any) -> Iterator[Backend]:
    """Prove a test on every backend: here on this machine's device, and two more where there is a GPU."""
    import torch  # late: a selection without these tests need not wait for it

    yield replace(request.param, alone=alone)
    cpu = torch.device("cpu")  # its kernels are the references, which tests of single parts expect
    qualify_kernels(cpu, request.param.config())
