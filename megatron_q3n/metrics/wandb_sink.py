"""Weights & Biases: the only file that imports wandb, and a run does without it where it is not installed.

wandb follows metrics.jsonl instead of being told each number a second time: the sink reads the lines that are
new there and sends those whose step wandb does not hold yet. That is what makes each step appear once, with the
same numbers, however often a run is killed. Three facts about wandb 0.31 shape it:

- A step once logged cannot be taken back offline (and `resume_from` is a server's feature). So an offline run,
  which nobody watches live, is sent only what a complete checkpoint covers; an online run is sent every step at
  once, and the steps it repeats after a resume are skipped.
- wandb's service keeps up to 15 seconds in memory and drops them when the run is killed. So a resumed run asks
  what wandb really holds (the newest local transaction log offline, the server online) and sends the rest from
  metrics.jsonl.
- An offline resume writes a second directory with the same run id; `wandb sync` joins them.
"""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.metrics import jsonl, sample_tables
from megatron_q3n.metrics.alerts import Alert
from megatron_q3n.metrics.expert_load_image import load_picture
from megatron_q3n.metrics.names import METRICS, STEP, TIME, TOKENS

Note = Callable[[str], None]

RUN_ID_FILE = "run_id"
EXPERT_LOAD_FILE = "expert_load.json"
EXPERT_LOAD_PICTURE = "experts/load"  # no number, like the tables of samples
EMPTY_LOG_BYTES = 7  # the header alone, all that a run killed in its first seconds leaves
INIT_TIMEOUT_SECONDS = 30  # wandb's own 90 is long for a cluster node without a way out


class WandbSink:
    """One wandb run that follows a metrics.jsonl; make it with `open_sink`."""

    def __init__(self, run: Any, records: Path, held_step: int, note: Note) -> None:
        self._run = run
        self._note, self._is_gone = note, False
        self._records = records
        self._offset = 0
        self._held_step = held_step
        self._pictured_step = 0
        self.online: bool = not run.offline

    def follow(self, up_to_step: int) -> None:
        """Send the records up to and with `up_to_step` that wandb does not hold."""
        self._while_there(lambda: self._send(up_to_step))

    def alert(self, alert: Alert) -> None:
        """Let wandb tell those who subscribed to it."""
        text = f"step {alert.step}: {alert.message}"
        self._while_there(lambda: self._run.alert(title=alert.kind, text=text, level="WARN"))

    def close(self, exit_code: int) -> None:
        """Send what is left of the run's state and end the run; 0 is success."""
        self._while_there(lambda: self._run.finish(exit_code=exit_code))

    def _while_there(self, act: Callable[[], object]) -> None:
        """Do without wandb's service once it has ended: a scheduler that stops a job may signal each of its processes.

        Nothing is lost: a resumed run asks what wandb holds and sends the rest from metrics.jsonl.
        """
        if self._is_gone:
            return
        try:
            act()
        except ConnectionError as error:
            self._is_gone = True
            self._note(f"wandb: its service is gone ({error}); a resume will send what is missing")

    def _send(self, up_to_step: int) -> None:
        records, offset = jsonl.read_from(self._records, self._offset)
        covered = [record for record in records if record[STEP] <= up_to_step]
        for record in covered:
            if record[STEP] > self._held_step:
                self._held_step = int(record[STEP])
                # wandb's own clock would stamp all steps of a checkpoint alike
                more = self._picture(record) | self._tables(record)
                values = {**record, "_timestamp": record[TIME], **more}
                self._run.log(values, step=self._held_step)
        if len(covered) == len(records):
            self._offset = offset

    def _picture(self, record: jsonl.Record) -> dict[str, Any]:
        """Return the picture of the expert load with the record of the step it was taken at."""
        path = self._records.with_name(EXPERT_LOAD_FILE)
        if record[STEP] != self._pictured_step and path.exists():
            load = json.loads(path.read_text(encoding="utf-8"))
            if load["step"] == record[STEP]:
                self._pictured_step = int(record[STEP])
                image = _quiet_wandb().Image(load_picture(load), caption=f"step {load['step']:,}")
                return {EXPERT_LOAD_PICTURE: image}
        return {}

    def _tables(self, record: jsonl.Record) -> dict[str, Any]:
        """Return the tables of samples that belong to a record."""
        found = sample_tables.tables_at(self._records.parent, int(record[STEP]))
        columns = list(sample_tables.COLUMNS)
        return {name: _quiet_wandb().Table(columns=columns, data=rows, allow_mixed_types=True) for name, rows in found}


def open_sink(run_dir: Path, config: RunConfig, records: Path, note: Note) -> WandbSink | None:
    """Start or continue this run directory's wandb run and say so through `note`; None when there is to be none.

    Raises: UserError when `logging.wandb.mode` asks for what wandb cannot do: not installed, not logged in, no
    network.
    """
    mode = _resolve_mode(run_dir, config.logging.wandb.mode, note)
    if mode == "disabled":
        return None
    run = _start(run_dir, config, mode, note)
    if run.offline:
        note(f"wandb: offline; to upload: wandb sync {run_dir}/wandb/*run-*")
        return WandbSink(run, records, held_offline(run_dir, note), note)
    note(f"wandb: {run.url}")
    return WandbSink(run, records, run.starting_step - 1, note)  # the server goes on after its last step


def installed() -> bool:
    """Say whether wandb can be imported; a run directory's `wandb/` folder in the working directory is not it."""
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


def held_offline(run_dir: Path, note: Note) -> int:
    """Return the last step in the local transaction logs, 0 for none, read by wandb's own reader.

    Each log starts after the ones before it, so the newest that holds a step decides. A killed run's log may
    hold none.
    """
    logs = (run_dir / "wandb").glob("*run-*/*.wandb")
    by_start_time = sorted(logs, key=lambda log: log.parent.name.removeprefix("offline-"))
    for log in reversed(by_start_time):
        step = _last_step(log, note) if log.stat().st_size > EMPTY_LOG_BYTES else None
        if step is not None:
            return step
    return 0


def _last_step(log: Path, note: Note) -> int | None:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(log)]
    offline = {**os.environ, "WANDB_MODE": "offline"}  # the reader itself reports home otherwise
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        note(f"wandb: {log} cannot be read; its steps may be sent again ({done.stderr.strip()})")
        return None
    step: int | None = json.loads(done.stdout)["step"]
    return step


def _resolve_mode(run_dir: Path, asked: str, note: Note) -> str:
    """Return online, offline or disabled. A run that began offline stays so under `auto`: its logs belong together."""
    if asked == "disabled":
        return asked
    if not installed():
        if asked != "auto":
            raise _cannot(asked, "wandb is not installed", "pip install wandb")
        note("wandb: not installed, so nothing is sent to it; metrics.jsonl holds every number")
        return "disabled"
    if asked != "auto":
        return asked
    wish = os.environ.get("WANDB_MODE", "")
    if wish == "disabled":
        note("wandb: off, by WANDB_MODE")
    if wish in ("offline", "disabled"):
        return wish
    began_offline = any((run_dir / "wandb").glob("offline-run-*"))
    return "offline" if began_offline or not _logged_in() else "online"


def _quiet_wandb() -> Any:
    """Import wandb and silence its own words in the terminal; what matters is said through `note`."""
    import wandb  # late: costs half a second on every rank, and may be missing

    wandb.setup(wandb.Settings(silent=True))
    return wandb


def _logged_in() -> bool:
    """Say whether wandb finds credentials (environment, settings, netrc), without asking the network or the person."""
    wandb = _quiet_wandb()
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error as error:
        raise _cannot("auto", str(error), "mend the credentials with `wandb login`") from error


def _start(run_dir: Path, config: RunConfig, mode: str, note: Note) -> Any:
    """Start wandb in `mode`; under `auto`, an online run whose server is out of reach becomes an offline one."""
    wandb = _quiet_wandb()
    asked = config.logging.wandb.mode
    try:
        return _init(run_dir, config, mode)
    except wandb.errors.Error as error:
        if asked != "auto" or mode == "offline":
            raise _cannot(asked, str(error), "run `wandb login`, or check the network") from error
        note(f"wandb: logged in, but the server did not answer ({error}); this run is offline")
        wandb.teardown()  # its service still holds the run id of the attempt
        return _init(run_dir, config, "offline")


def _init(run_dir: Path, config: RunConfig, mode: str) -> Any:
    wandb = _quiet_wandb()
    settings = config.logging.wandb
    patience = float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_SECONDS))
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
        settings=wandb.Settings(silent=True, console="off", init_timeout=patience),
    )
    _define_metrics(run)
    return run


def _define_metrics(run: Any) -> None:
    """Put tokens on every panel's x axis, and the best value beside the last where one is wanted."""
    run.define_metric(TOKENS, hidden=True)
    run.define_metric("*", step_metric=TOKENS)
    for metric in METRICS:
        if metric.best:
            run.define_metric(metric.name, step_metric=TOKENS, summary=f"{metric.best},last")


def _run_id(run_dir: Path) -> str:
    """Return the wandb id that this run directory keeps over all its resumes, made on first use."""
    path = run_dir / "wandb" / RUN_ID_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(secrets.token_hex(6) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return path.read_text(encoding="utf-8").strip()


def _cannot(mode: str, found: str, remedy: str) -> UserError:
    return UserError(
        f"logging.wandb.mode={mode}: {found}. To use wandb: {remedy}. To do without: logging.wandb.mode=offline "
        "(upload later) or disabled."
    )
