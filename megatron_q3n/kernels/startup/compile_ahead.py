"""Compile the delta rule's kernels while the libraries are imported: the waiting side, which needs no torch.

On a cold machine a start waits for compilation above all: FlashQLA's seven kernels took 75 to 100 s on H200s' hosts,
one after the other, each where the check first needs it, and 31 to 47 of them were the backward kernel's. So the
first process of a machine starts a helper (`delta_rule_compiler.py`) before it imports torch; that compiles them side
by side into TileLang's cache, and the check finds them there. Nothing depends on it: whatever the helper lacks or
fails at, the check compiles as ever, and environment.json says so.

Helper and cache. TileLang publishes a kernel by renaming a whole folder and verifies it when it is read, so processes
may share a cache. A file lock goes with the helper: the other processes of this machine wait for it and then find the
same kernels; it ends with the helper, however that ends. A stamp in the cache says that all was compiled before,
so that a warm start starts no helper. The helper ends with this process: its input is a pipe from here.
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
_TRACES_OF_A_GPU = ("/dev/nvidiactl", "/proc/driver/nvidia/version")  # a sandbox may lack either
_PATIENCE_SECONDS = 300.0  # then the check goes on alone: it needs no more than that by itself


@dataclass
class _Helper:
    """The helper of this process, or only the lock of another process's."""

    lock: IO[bytes]
    process: subprocess.Popen[bytes] | None
    output: IO[bytes]
    errors: IO[bytes]


_helper: _Helper | None = None
_report: str | None = None


def start(config: RunConfig) -> None:
    """Begin to compile, if this machine has a GPU, the packages, and not yet these kernels. Returns at once."""
    if _helper is None and _serves(config):
        start_helper({"problems": [asdict(one) for one in problems_to_compile(config)]})


def start_helper(request: dict[str, object], command: Sequence[str] = _COMMAND) -> None:
    """Start the helper on the first process of this machine; on the others, note what to wait for."""
    global _report
    _report = None
    try:
        _begin(request, command)
    except OSError as error:
        stop()
        _report = f"NOT STARTED ({error}); the check compiles by itself"


def _begin(request: dict[str, object], command: Sequence[str]) -> None:
    global _helper
    digest = hashlib.sha256(json.dumps([request, _surroundings()]).encode()).hexdigest()[:24]
    stamp = _cache() / "megatron_q3n" / digest
    if stamp.exists():
        return
    # not in the cache: that may lie on a file system without locks; the lock is this machine's affair
    lock = (Path(tempfile.gettempdir()) / f"megatron_q3n-{os.getuid()}-{digest}.lock").open("ab")
    output, errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115  `stop` closes them
    _helper = _Helper(lock, None, output, errors)
    if launch.local_rank() == 0 and _try_lock(lock, fcntl.LOCK_EX):
        _helper.process = _spawn({**request, "stamp": str(stamp)}, command, _helper)
        lock.close()  # now it is the helper's alone
        atexit.register(stop)


def finish() -> str | None:
    """Wait for the helper.

    Returns: what became of it, for environment.json; None where nothing was to be compiled ahead.
    """
    global _helper, _report
    if _helper is not None:
        helper, begun = _helper, time.monotonic()
        deadline = begun + _PATIENCE_SECONDS
        found = _wait_for_other(helper, deadline)
        if helper.process is not None:
            found = _wait(helper, helper.process, deadline)
        _report = f"{found}; waited for it {time.monotonic() - begun:.1f} s"
        stop()
    return _report


def stop() -> None:
    """End the helper and all it started, if it still runs."""
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


def _serves(config: RunConfig) -> bool:
    """Whether FlashQLA will run here, as far as that shows without torch."""
    model = config.model
    return (
        config.precision.compute == "bf16"
        and GATED_DELTA_NET in model.mixer_pattern
        and model.linear_key_head_dim == model.linear_value_head_dim == 128  # what FlashQLA takes
        and os.environ.get("FLA_FLASH_QLA") != "0"
        and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
        and any(Path(trace).exists() for trace in _TRACES_OF_A_GPU)
        and all(importlib.util.find_spec(name) for name in ("fla", "flash_qla", "tilelang"))
    )


def _surroundings() -> list[str | None]:
    """Return what else decides whether compiled kernels are the right ones."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = {line for gpu in gpus for line in gpu.read_text().splitlines() if "Model:" in line}
    return [*(_version(name) for name in _PACKAGES), *sorted(models)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cache() -> Path:
    """Return TileLang's own choice of a folder."""
    return Path(os.environ.get("TILELANG_CACHE_DIR") or Path.home() / ".tilelang" / "cache")


def _spawn(request: dict[str, object], command: Sequence[str], helper: _Helper) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, "TILELANG_PRINT_ON_COMPILATION": "0"},
        stdin=subprocess.PIPE,
        stdout=helper.output,
        stderr=helper.errors,
        pass_fds=[helper.lock.fileno()],  # so the lock lasts as long as the helper
        start_new_session=True,  # a group of its own, to be ended with the compilers it starts
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended already; `finish` tells why
    return process


def _wait(helper: _Helper, process: subprocess.Popen[bytes], deadline: float) -> str:
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"not done after {_PATIENCE_SECONDS:.0f} s and ended; the check compiles what is missing"
    output, errors = (_text(file) for file in (helper.output, helper.errors))
    if code == 0:
        return output.strip()
    last = (errors.strip().splitlines() or ["it said nothing"])[-1]
    return f"FAILED ({code}: {last}); the check compiles by itself"


def _wait_for_other(helper: _Helper, deadline: float) -> str:
    while helper.process is None and not _try_lock(helper.lock, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            return f"another process was not done after {_PATIENCE_SECONDS:.0f} s; the check compiles what is missing"
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
