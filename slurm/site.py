"""Site settings of a cluster: one YAML file, selected with --site NAME_OR_PATH or $Q3N_SITE.

A name refers to slurm/sites/NAME.yaml. sites/example.yaml shows the settings.
"""

import os
import re
import sys
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from megatron_q3n.config import UserError, suggest
from megatron_q3n.config.section import Section

SITES = Path(__file__).parent / "sites"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


class Preflight(Section):
    """Requirements on every node before training starts; see slurm/preflight.py."""

    minimum_free_gib: float = Field(20.0, ge=0, description="free space in the run directory's file system")
    gpus_expected: int | None = Field(None, ge=0, description="number on each node; null: gpus_per_node")
    minimum_gpu_free_mib: float = Field(60000.0, ge=0)
    minimum_disk_mib_per_second: float = Field(20.0, ge=0)
    minimum_network_mib_per_second: float = Field(50.0, ge=0)
    timeout_seconds: float = Field(120.0, gt=0)


class Site(Section):
    """Settings of a cluster for job scripts."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = Field("24:00:00", description="time limit of one job; the run continues after a requeue")
    save_margin_seconds: int = Field(
        300, gt=0, description="time before the limit for one step, one save and the report"
    )
    gpus_per_node: int = Field(0, ge=0)
    gpu_memory_gib: float | None = Field(None, description="a recipe that needs more is rejected")
    processes_per_node: int | None = Field(None, gt=0, description="null: gpus_per_node, or 1")
    cpus_per_process: int = Field(1, gt=0)
    memory_per_node: str | None = Field(None, description="value of --mem; 0: all memory")
    launcher: Literal["srun", "torchrun"] = Field(
        "srun", description="srun: one task per rank; torchrun: one task per node, which starts the ranks"
    )
    python: str = Field(sys.executable, description="Python of the environment, on the nodes")
    node_python: str = Field("python3", description="Python 3.9 or newer outside containers")
    setup: list[str] = Field(default_factory=list, description="shell lines of the job script, e.g. module load …")
    environment: dict[str, str] = Field(default_factory=dict, description="variables, e.g. NCCL_SOCKET_IFNAME")
    sbatch_arguments: list[str] = Field(default_factory=list)
    srun_arguments: list[str] = Field(default_factory=list, description="e.g. --container-image=…, --mpi=…")
    master_address: str | None = Field(None, description="null: the Slurm name of the first node")
    attempts_without_progress: int = Field(3, gt=0, description="number after which the job gives up")
    max_excluded_nodes: int = Field(2, ge=0, description="nodes of one run that the pre-flight check may exclude")
    preflight: Preflight | None = Preflight()

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        if matches := [name for name in environment if SECRET.search(name)]:
            raise UserError(
                f"site: environment.{matches[0]} looks like a secret; it would be written into the run directory. "
                "Log in on the cluster (wandb login), or export it in the shell from which you submit."
            )
        return environment

    @field_validator("setup")
    @classmethod
    def _no_secret_lines(cls, lines: list[str]) -> list[str]:
        if matches := [line for line in lines if re.search(rf"(?:{SECRET.pattern})\w*=\S", line, re.I)]:
            raise UserError(
                f"site: setup sets {matches[0].split('=')[0]}, which looks like a secret; it would be written into "
                "the job script. Read it in the script from a file that only you can read."
            )
        return lines

    @field_validator("time")
    @classmethod
    def _is_time(cls, time: str) -> str:
        if not TIME.fullmatch(time):
            raise UserError(f"site: time={time}: write [days-]hours:minutes:seconds, as Slurm does.")
        return time

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node or 1


def load_site(chosen: str | None) -> Site:
    """Read the settings of a site; return the defaults if none is selected.

    Raises: UserError for a file that does not exist or is not valid.
    """
    chosen = chosen or os.environ.get("Q3N_SITE")
    if not chosen:
        return Site()
    path = Path(chosen) if chosen.endswith((".yaml", ".yml")) else SITES / f"{chosen}.yaml"
    if not path.is_file():
        names = sorted(path.stem for path in SITES.glob("*.yaml"))
        raise UserError(
            f"--site {chosen}: {path} does not exist.{suggest(chosen, names)} Create it from {SITES / 'example.yaml'}."
        )
    try:
        return Site.model_validate(yaml.safe_load(path.read_text()) or {})
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{path}: {_location(p)}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors())
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None


def _location(problem: object) -> str:
    return ".".join(str(part) for part in problem["loc"])  # type: ignore[index]
