"""Start of the workers of the tests on two GPUs, as users start training: torchrun on one host."""

import subprocess
import sys
from pathlib import Path

SECONDS = 800


def torchrun(processes: int, worker: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a worker of this folder in `processes` ranks, with its output in one string; the caller checks results."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = str(Path(__file__).parent / worker)
    return subprocess.run(
        [*command, path, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
