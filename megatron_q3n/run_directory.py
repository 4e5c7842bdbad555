"""Run directory: config.yaml, environment.json, metrics.jsonl, checkpoints/, logs/ and report.html.

A run resumes from its directory alone. Here it is named, created, checked on resume, and described; `StopRequest`
collects the reasons to stop early.
"""

import contextlib
import errno
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from megatron_q3n.config import RunConfig, UserError, launch
from megatron_q3n.device import Device

CONFIG, ENVIRONMENT, LATEST = "config.yaml", "environment.json", "latest"
OUTCOME = "logs/outcome.json"
_OUTCOME_BYTES, _MAX_MESSAGE_LENGTH = 8192, 600
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# of fine-tuned models, with the chat template
TOKENIZER_FOLDER = "tokenizer"
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-linear-attention",
    "flash-qla",
    "triton",
    "transformers",
    "tokenizers",
    "hydra-core",
    "pydantic",
    "wandb",
    "numpy",
)


def choose(config: RunConfig) -> Path:
    """Return the directory of this run: config.run_dir, or a new name below config.runs_dir."""
    if config.run_dir:
        return Path(config.run_dir).resolve()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Path(config.runs_dir).resolve() / f"{config.recipe}-{stamp}-{secrets.token_hex(2)}"


def open_directory(run_dir: Path, config: RunConfig) -> None:
    """Create the directory and write config.yaml. Called by the leader.

    Raises: UserError if it cannot be written.
    """
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / OUTCOME).write_bytes(b"{}".ljust(_OUTCOME_BYTES - 1) + b"\n")
        tree = config.model_dump(mode="json") | {"run_dir": None}
        # allowed for one start only
        tree["data"]["accept_changed_contents"] = False
        write_atomically(run_dir / CONFIG, yaml.safe_dump(tree, sort_keys=False))
    except OSError as error:
        raise UserError(
            f"run directory {run_dir} cannot be written: {error}. Choose another with run_dir=… or runs_dir=…."
        ) from None


def record_environment(
    run_dir: Path, device: Device, kernels: dict[str, str], execution_plan: dict[str, dict[str, str]]
) -> None:
    """Write this start to environment.json: machine, versions, and every backend, kernel and path with its reason."""
    path = run_dir / ENVIRONMENT
    sessions: list[Any] = []
    if path.is_file():
        # a file that a kill left incomplete: the history of starts is dropped
        with contextlib.suppress(ValueError):
            sessions = json.loads(path.read_text()).get("earlier_sessions", [])
            sessions.append({k: v for k, v in json.loads(path.read_text()).items() if k != "earlier_sessions"})
    environment = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processes": launch.world_size(),
        "cpus": os.cpu_count(),
        "gpu": device.gpu_name,
        "backends": {**device.backends, **kernels},
        "execution_plan": execution_plan,
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_state(),
        "earlier_sessions": sessions,
    }
    write_atomically(path, json.dumps(environment, indent=1))


def record_isolation(run_dir: Path, isolation: dict[str, Any]) -> None:
    """Add what confines the scoring worker processes to environment.json."""
    path = run_dir / ENVIRONMENT
    write_json(path, json.loads(path.read_text()) | {"reward_workers": isolation})


def record_outcome(run_dir: Path, code: int, message: str = "") -> None:
    """Write how the run ended to logs/outcome.json, for the supervisor. Only the leader writes.

    Launchers do not pass on exit codes: torchrun turns each into 1, srun reports those of processes it killed. The file
    has a fixed size and exists since the run directory was opened, so that it can be written on a full disk.
    """
    path = run_dir / OUTCOME
    if launch.rank() != 0 or not path.parent.is_dir():
        return
    outcome = {"code": code, "message": message[:_MAX_MESSAGE_LENGTH], "time": time.time()}
    content = json.dumps(outcome).encode().ljust(_OUTCOME_BYTES - 1) + b"\n"
    try:
        with path.open("r+b" if path.is_file() else "wb") as file:
            file.write(content)
            file.truncate()
    except OSError as error:
        print(f"warning: {path} could not be written ({error.strerror}): exit code {code}", file=sys.stderr)


def full_disk_error(run_dir: Path, error: OSError) -> UserError | None:
    """Return the message for a write that failed since a disk is full or read-only; None for another error.

    To start such a run again is of no use until space is free, so it ends with exit code 2, which Slurm does not retry.
    """
    if error.errno not in _FULL_DISK:
        return None
    # a write, unlike the opening of a file, does not name it
    place = error.filename or f"{run_dir}: a file of this run"
    return UserError(
        f"{place} could not be written ({error.strerror}). Complete checkpoints are not affected; free space, or make "
        "the disk writable, then resume the run."
    )


def write_json(path: Path, content: Any) -> None:
    """Write a result file for the report, atomically."""
    write_atomically(path, json.dumps(content, indent=1))


def write_expert_load(run_dir: Path, step: int, loads: dict[str, list[float]]) -> None:
    """Write each MoE layer's expert load over the step's global batch, for the report and wandb."""
    layers = [{"name": name, "share": share} for name, share in loads.items()]
    write_json(run_dir / "expert_load.json", {"step": step, "layers": layers})


def write_atomically(path: Path, text: str) -> None:
    """Replace a file atomically, so that neither a reader nor a kill can see an incomplete one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        # a write that fails on a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_writable(path: Path, setting: str, *, replaced: bool) -> None:
    """Check, before the work, that its results can be written to a file; `replaced`: by renaming a new one to its name.

    Only the leader checks, since it writes. Pipes and devices are not tried.
    Raises: UserError naming the setting.
    """
    if launch.rank() != 0:
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if replaced or not path.exists():
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}.").close()
        elif path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise UserError(
            f"{setting}={path}: the results could not be written there ({error.strerror}). Nothing was computed; give "
            "a file in an existing folder that you may write to."
        ) from None


class StopRequest:
    """Reasons to save and stop early: a signal or the time limit."""

    def __init__(self, time_limit_minutes: float | None, started: float) -> None:
        self._deadline = None if time_limit_minutes is None else started + 60 * time_limit_minutes
        self._signal: str | None = None

    def signalled(self, number: int, _frame: object) -> None:
        """Record a signal; the loop stops after the current step."""
        self._signal = signal.Signals(number).name
        # a second Ctrl-C ends the process at once
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def listen(self) -> None:
        """Install handlers of SIGTERM, SIGUSR1 and the first Ctrl-C."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.signalled)

    def reason(self) -> str | None:
        """Return the reason to stop, or None."""
        if self._signal:
            return f"{self._signal} received"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "checkpoint.time_limit_minutes reached"
        return None


def point_latest(run_dir: Path) -> None:
    """Link `latest` to a run that has begun: a refused one does not replace the last that trained."""
    link = run_dir.parent / LATEST
    if link.exists() and not link.is_symlink():
        # a folder of the user with that name
        return
    fresh = run_dir.parent / f".{LATEST}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(run_dir.name)
    os.replace(fresh, link)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """Return the commit of the code, with -dirty if the tree differs from it; None outside of a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
