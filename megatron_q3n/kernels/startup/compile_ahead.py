"""Ahead-of-time compilation of the delta rule's kernels in a helper process, parent side; does not import torch.

On a cold machine the start-up time is mostly compilation: FlashQLA's seven kernels took 75 to 100 s on H200 hosts, one
after the other, each where the check first needs it; 31 to 47 s of them for the backward kernel. So the first process
of a machine starts a helper (`delta_rule_compiler.py`) before it imports torch. The helper compiles the kernels in
parallel into TileLang's cache, where the check finds them. The helper is optional: if it fails, the kernels are
compiled during the check, and environment.json reports it.

TileLang publishes a kernel by renaming a whole folder and verifies it when it is read, so processes may share a cache.
The helper holds a file lock: the other processes of this machine wait for the lock and then find the same kernels. The
lock is released when the helper ends, however it ends. A stamp file in the cache records that all kernels were
compiled, so a warm start does not start a helper. The helper ends with its parent: its stdin is a pipe from it.
"""

import atexit
import fcntl
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from megatron_q3n.config import GATED_DELTA_NET, RunConfig, launch
from megatron_q3n.kernels.startup.delta_rule_problems import problems_to_compile

_ROOT = Path(__file__).resolve().parents[3]
_COMMAND = (sys.executable, "-m", "megatron_q3n.kernels.startup.delta_rule_compiler")
_PACKAGES = ("flash-qla", "tilelang")
# files that exist on a machine with an NVIDIA GPU; a sandbox may lack either
_GPU_FILES = ("/dev/nvidiactl", "/proc/driver/nvidia/version")
# after that the kernels are compiled during the check, which takes no longer
_TIMEOUT_SECONDS = 300.0


@dataclass
class _Helper:
    """The helper of this process, or only the lock of another process's helper (`process` is None)."""

    lock: IO[bytes]
    process: subprocess.Popen[bytes] | None
    output: IO[bytes]
    errors: IO[bytes]


_helper: _Helper | None = None
_report: str | None = None


def start(config: RunConfig) -> None:
    """Start compilation if this machine has a GPU, the packages, and not yet these kernels. Returns at once."""
    if _helper is None and _is_needed(config):
        start_helper({"problems": [asdict(one) for one in problems_to_compile(config)]})


def start_helper(request: dict[str, object], command: Sequence[str] = _COMMAND) -> None:
    """Start the helper in the first process of this machine; in the others, open its lock for `finish`."""
    global _report
    _report = None
    try:
        _start(request, command)
    except OSError as error:
        stop()
        _report = f"NOT STARTED ({error}); the kernels are compiled during the check"


def _start(request: dict[str, object], command: Sequence[str]) -> None:
    global _helper
    digest = hashlib.sha256(json.dumps([request, _environment()]).encode()).hexdigest()[:24]
    stamp = _cache() / "megatron_q3n" / digest
    if stamp.exists():
        return
    # not in the cache directory, which may be on a file system without locks; the lock concerns this machine only
    lock = (Path(tempfile.gettempdir()) / f"megatron_q3n-{os.getuid()}-{digest}.lock").open("ab")
    output, errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115  `stop` closes them
    _helper = _Helper(lock, None, output, errors)
    if launch.local_rank() == 0 and _try_lock(lock, fcntl.LOCK_EX):
        _helper.process = _spawn({**request, "stamp": str(stamp)}, command, _helper)
        # the helper is now the only holder
        lock.close()
        atexit.register(stop)


def finish() -> str | None:
    """Wait for the helper.

    Returns: its result, for environment.json; None where nothing was compiled ahead.
    """
    global _helper, _report
    if _helper is not None:
        helper, started = _helper, time.monotonic()
        deadline = started + _TIMEOUT_SECONDS
        result = _wait_for_other(helper, deadline)
        if helper.process is not None:
            result = _wait(helper, helper.process, deadline)
        _report = f"{result}; waited {time.monotonic() - started:.1f} s"
        stop()
    return _report


def stop() -> None:
    """Kill the helper and its process group, if it still runs."""
    global _helper
    helper, _helper = _helper, None
    if helper is None:
        return
    if helper.process is not None:
        if helper.process.poll() is None:
            os.killpg(helper.process.pid, signal.SIGKILL)
            helper.process.wait()
        assert helper.process.stdin is not None
        helper.process.stdin.close()
    for file in (helper.lock, helper.output, helper.errors):
        file.close()


def _is_needed(config: RunConfig) -> bool:
    """Return whether FlashQLA will run here, as far as that can be determined without torch."""
    model = config.model
    return (
        config.precision.compute == "bf16"
        and GATED_DELTA_NET in model.mixer_pattern
        # the head dim that FlashQLA supports
        and model.linear_key_head_dim == model.linear_value_head_dim == 128
        and os.environ.get("FLA_FLASH_QLA") != "0"
        and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
        and any(Path(path).exists() for path in _GPU_FILES)
        and all(importlib.util.find_spec(name) for name in ("fla", "flash_qla", "tilelang"))
    )


def _environment() -> list[str | None]:
    """Return what else the compiled kernels depend on: package versions and GPU models."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = {line for gpu in gpus for line in gpu.read_text().splitlines() if "Model:" in line}
    return [*(_version(name) for name in _PACKAGES), *sorted(models)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cache() -> Path:
    """Return TileLang's cache folder."""
    return Path(os.environ.get("TILELANG_CACHE_DIR") or Path.home() / ".tilelang" / "cache")


def _spawn(request: dict[str, object], command: Sequence[str], helper: _Helper) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, "TILELANG_PRINT_ON_COMPILATION": "0"},
        stdin=subprocess.PIPE,
        stdout=helper.output,
        stderr=helper.errors,
        # the lock is held as long as the helper runs
        pass_fds=[helper.lock.fileno()],
        # a process group of its own, so that it can be killed with the compilers it starts
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        # it has ended already; `finish` reports why
        pass
    return process


def _wait(helper: _Helper, process: subprocess.Popen[bytes], deadline: float) -> str:
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"not done after {_TIMEOUT_SECONDS:.0f} s and killed; the missing kernels are compiled during the check"
    output, errors = (_text(file) for file in (helper.output, helper.errors))
    if code == 0:
        return output.strip()
    last_line = (errors.strip().splitlines() or ["no error output"])[-1]
    return f"FAILED ({code}: {last_line}); the kernels are compiled during the check"


def _wait_for_other(helper: _Helper, deadline: float) -> str:
    while helper.process is None and not _try_lock(helper.lock, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            return (
                f"another process was not done after {_TIMEOUT_SECONDS:.0f} s; the missing kernels are compiled during "
                "the check"
            )
        time.sleep(0.1)
    return "by another process of this machine"


def _try_lock(lock: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
