"""Weights & Biases sink: the only file that imports wandb, which is optional.

The sink reads new lines of metrics.jsonl and logs those whose step wandb does not have yet. Each step therefore appears
once, with the same numbers, however often the run is killed. Three properties of wandb 0.31 determine the design:

- A logged step cannot be removed offline (`resume_from` needs the server). An offline run is therefore sent only steps
  covered by a complete checkpoint. An online run is sent every step immediately, and steps repeated after a resume are
  skipped.
- The wandb service buffers up to 15 seconds in memory and loses them when the run is killed. A resumed run therefore
  queries the last step that wandb has (from the newest local transaction log offline, from the server online) and sends
  the rest from metrics.jsonl.
- An offline resume writes a second directory with the same run id; `wandb sync` joins them.
"""

import importlib.util
import json
import logging
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.metrics import jsonl, sample_tables
from megatron_q3n.metrics.alerts import Alert
from megatron_q3n.metrics.expert_load_image import draw_expert_load
from megatron_q3n.metrics.names import METRICS, STEP, TIME, TOKENS

Notify = Callable[[str], None]

RUN_ID_FILE = "run_id"
EXPERT_LOAD_FILE = "expert_load.json"
# a media key, not a metric of names.py
EXPERT_LOAD_IMAGE = "experts/load"
# size of a transaction log that has only its header, as left by a run killed in its first seconds
EMPTY_LOG_BYTES = 7
# wandb's default of 90 is long for a cluster node without internet access
INIT_TIMEOUT_SECONDS = 30


class WandbSink:
    """One wandb run that is fed from a metrics.jsonl; created by `open_sink`."""

    def __init__(self, run: Any, records: Path, sent_step: int, note: Notify) -> None:
        self._run = run
        self._note, self._is_disconnected = note, False
        self._records = records
        self._offset = 0
        self._sent_step = sent_step
        self._image_step = 0
        self.online: bool = not run.offline

    def follow(self, up_to_step: int) -> None:
        """Send the records up to `up_to_step` that wandb does not have yet."""
        self._run_while_connected(lambda: self._send(up_to_step))

    def alert(self, alert: Alert) -> None:
        """Send an alert to the subscribers of the wandb run."""
        text = f"step {alert.step}: {alert.message}"
        self._run_while_connected(lambda: self._run.alert(title=alert.kind, text=text, level="WARN"))

    def close(self, exit_code: int) -> None:
        """Finish the wandb run; exit code 0 is success."""
        self._run_while_connected(lambda: self._run.finish(exit_code=exit_code))

    def _run_while_connected(self, act: Callable[[], object]) -> None:
        """Call `act` unless the wandb service has exited.

        A scheduler that stops a job may signal all of its processes, the wandb service included. No data is lost: a
        resumed run sends the missing steps from metrics.jsonl.
        """
        if self._is_disconnected:
            return
        try:
            act()
        except ConnectionError as error:
            self._is_disconnected = True
            self._note(f"wandb: the service has exited ({error}); a resumed run will send the missing steps")

    def _send(self, up_to_step: int) -> None:
        records, offset = jsonl.read_from(self._records, self._offset)
        covered = [record for record in records if record[STEP] <= up_to_step]
        for record in covered:
            if record[STEP] > self._sent_step:
                self._sent_step = int(record[STEP])
                # without _timestamp, all steps sent at one checkpoint would get the same time
                media = self._expert_load_image(record) | self._sample_tables(record)
                values = {**record, "_timestamp": record[TIME], **media}
                self._run.log(values, step=self._sent_step)
        if len(covered) == len(records):
            self._offset = offset

    def _expert_load_image(self, record: jsonl.Record) -> dict[str, Any]:
        """Return the expert load image if expert_load.json is of this record's step, else nothing."""
        path = self._records.with_name(EXPERT_LOAD_FILE)
        if record[STEP] != self._image_step and path.exists():
            load = json.loads(path.read_text(encoding="utf-8"))
            if load["step"] == record[STEP]:
                self._image_step = int(record[STEP])
                image = _quiet_wandb().Image(draw_expert_load(load), caption=f"step {load['step']:,}")
                return {EXPERT_LOAD_IMAGE: image}
        return {}

    def _sample_tables(self, record: jsonl.Record) -> dict[str, Any]:
        """Return the sample tables of a record's step."""
        tables = sample_tables.tables_at(self._records.parent, int(record[STEP]))
        columns = list(sample_tables.COLUMNS)
        return {name: _quiet_wandb().Table(columns=columns, data=rows, allow_mixed_types=True) for name, rows in tables}


def open_sink(run_dir: Path, config: RunConfig, records: Path, note: Notify) -> WandbSink | None:
    """Start or resume the wandb run of this run directory and report it through `note`.

    Returns: the sink, or None if wandb is disabled.

    Raises: UserError if `logging.wandb.mode` is not available: wandb not installed, not logged in, or no network.
    """
    mode = _resolve_mode(run_dir, config.logging.wandb.mode, note)
    if mode == "disabled":
        return None
    # wandb's log file is in the run directory: on a full disk each of its lines would print a traceback
    logging.raiseExceptions = False
    run = _start(run_dir, config, mode, note)
    if run.offline:
        note(f"wandb: offline; to upload: wandb sync {shlex.quote(str(run_dir))}/wandb/*run-*")
        return WandbSink(run, records, last_logged_offline_step(run_dir, note), note)
    note(f"wandb: {run.url}")
    # the server resumes after its last step
    return WandbSink(run, records, run.starting_step - 1, note)


def installed() -> bool:
    """Return whether wandb can be imported; a `wandb/` folder in the working directory does not count."""
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


def last_logged_offline_step(run_dir: Path, note: Notify) -> int:
    """Return the last step in the local transaction logs, 0 if there is none, read with wandb's own reader.

    Each log starts after the previous one, so the newest log that has a step is used. The log of a killed run may have
    none.
    """
    logs = (run_dir / "wandb").glob("*run-*/*.wandb")
    by_start_time = sorted(logs, key=lambda log: log.parent.name.removeprefix("offline-"))
    for log in reversed(by_start_time):
        step = _last_step(log, note) if log.stat().st_size > EMPTY_LOG_BYTES else None
        if step is not None:
            return step
    return 0


def _last_step(log: Path, note: Notify) -> int | None:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(log)]
    # without this the reader sends usage data to the server
    offline = {**os.environ, "WANDB_MODE": "offline"}
    result = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        note(f"wandb: {log} cannot be read; its steps may be sent again ({result.stderr.strip()})")
        return None
    step: int | None = json.loads(result.stdout)["step"]
    return step


def _resolve_mode(run_dir: Path, requested: str, note: Notify) -> str:
    """Return online, offline or disabled.

    Under `auto`, a run that began offline stays offline, so that its transaction logs can be synced together.
    """
    if requested == "disabled":
        return requested
    if not installed():
        if requested != "auto":
            raise _unavailable(requested, "wandb is not installed", "pip install wandb")
        note("wandb: not installed, nothing is sent; metrics.jsonl has all metrics")
        return "disabled"
    if requested != "auto":
        return requested
    from_environment = os.environ.get("WANDB_MODE", "")
    if from_environment == "disabled":
        note("wandb: disabled by WANDB_MODE")
    if from_environment in ("offline", "disabled"):
        return from_environment
    began_offline = any((run_dir / "wandb").glob("offline-run-*"))
    return "offline" if began_offline or not _logged_in() else "online"


def _quiet_wandb() -> Any:
    """Import wandb and disable its terminal output; relevant messages go through `note`."""
    # imported here: takes half a second on every rank, and may be missing
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb


def _logged_in() -> bool:
    """Return whether wandb finds credentials (environment, settings, netrc), without network access or a prompt."""
    wandb = _quiet_wandb()
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error as error:
        raise _unavailable("auto", str(error), "renew the credentials with `wandb login`") from error


def _start(run_dir: Path, config: RunConfig, mode: str, note: Notify) -> Any:
    """Start wandb in `mode`; under `auto`, fall back to offline if the server cannot be reached."""
    wandb = _quiet_wandb()
    requested = config.logging.wandb.mode
    try:
        return _init(run_dir, config, mode)
    except wandb.errors.Error as error:
        if requested != "auto" or mode == "offline":
            raise _unavailable(requested, str(error), "run `wandb login`, or check the network") from error
        note(f"wandb: logged in, but the server cannot be reached ({error}); this run is offline")
        # the wandb service still has the run id of the failed attempt
        wandb.teardown()
        return _init(run_dir, config, "offline")


def _init(run_dir: Path, config: RunConfig, mode: str) -> Any:
    wandb = _quiet_wandb()
    settings = config.logging.wandb
    timeout_seconds = float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_SECONDS))
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        tags=settings.tags or None,
        name=run_dir.resolve().name,
        id=_run_id(run_dir),
        resume="allow",
        mode=cast(Literal["online", "offline"], mode),
        dir=run_dir,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off", init_timeout=timeout_seconds),
    )
    _define_metrics(run)
    return run


def _define_metrics(run: Any) -> None:
    """Set tokens as the x axis of every panel, and the best value in the summary of metrics that define one."""
    run.define_metric(TOKENS, hidden=True)
    run.define_metric("*", step_metric=TOKENS)
    for metric in METRICS:
        if metric.best:
            run.define_metric(metric.name, step_metric=TOKENS, summary=f"{metric.best},last")


def _run_id(run_dir: Path) -> str:
    """Return the wandb run id of this run directory, created on first use and kept over resumes."""
    path = run_dir / "wandb" / RUN_ID_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(secrets.token_hex(6) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return path.read_text(encoding="utf-8").strip()


def _unavailable(mode: str, reason: str, remedy: str) -> UserError:
    return UserError(
        f"logging.wandb.mode={mode}: {reason}. To use wandb: {remedy}. To run without it: logging.wandb.mode=offline "
        "(upload later) or disabled."
    )
