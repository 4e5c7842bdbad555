"""What is particular to a cluster: one YAML file, chosen with --site NAME_OR_PATH or $Q3N_SITE.

A name means slurm/sites/NAME.yaml. sites/example.yaml shows every setting.
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
    """What every node must show before training starts; see slurm/preflight.py."""

    minimum_free_gib: float = Field(20.0, ge=0, description="room in the run directory's file system")
    gpus_expected: int | None = Field(None, ge=0, description="on each node; null: gpus_per_node")
    minimum_gpu_free_mib: float = Field(60000.0, ge=0)
    minimum_disk_mib_per_second: float = Field(20.0, ge=0)
    minimum_network_mib_per_second: float = Field(50.0, ge=0)
    timeout_seconds: float = Field(120.0, gt=0)


class Site(Section):
    """A cluster, as far as job scripts must know it."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = Field("24:00:00", description="limit of one slice; the run goes on in the next")
    save_margin_seconds: int = Field(300, gt=0, description="before the limit: one step, one save, the report")
    gpus_per_node: int = Field(0, ge=0)
    gpu_memory_gib: float | None = Field(None, description="a recipe that needs more is refused")
    processes_per_node: int | None = Field(None, gt=0, description="null: gpus_per_node, or 1")
    cpus_per_process: int = Field(1, gt=0)
    memory_per_node: str | None = Field(None, description="as --mem takes it; 0 is all")
    launcher: Literal["srun", "torchrun"] = Field(
        "srun", description="srun: one task per rank; torchrun: one per node, which starts the ranks"
    )
    python: str = Field(sys.executable, description="the environment's, on the nodes")
    node_python: str = Field("python3", description="any Python 3.9 outside containers")
    setup: list[str] = Field(default_factory=list, description="lines of shell: module load …")
    environment: dict[str, str] = Field(default_factory=dict, description="NCCL_SOCKET_IFNAME …")
    sbatch_arguments: list[str] = Field(default_factory=list)
    srun_arguments: list[str] = Field(default_factory=list, description="--container-image=…, --mpi=…")
    master_address: str | None = Field(None, description="null: the first node's name, as Slurm knows it")
    attempts_without_progress: int = Field(3, gt=0, description="then the job gives up")
    max_excluded_nodes: int = Field(2, ge=0, description="of one run, by the pre-flight")
    preflight: Preflight | None = Preflight()

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        if found := [name for name in environment if SECRET.search(name)]:
            raise UserError(
                f"site: environment.{found[0]} looks like a secret; it would be written into the run directory. "
                "Log in on the cluster instead (wandb login), or export it in the shell you submit from."
            )
        return environment

    @field_validator("setup")
    @classmethod
    def _no_secret_lines(cls, lines: list[str]) -> list[str]:
        if found := [line for line in lines if re.search(rf"(?:{SECRET.pattern})\w*=\S", line, re.I)]:
            raise UserError(
                f"site: setup sets {found[0].split('=')[0]}, which looks like a secret; it would be written into "
                "the job script. Read it there from a file that only you can read."
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
    """Read the site's settings; without any choice, plain defaults.

    Raises: UserError for a file that is not there or not right.
    """
    chosen = chosen or os.environ.get("Q3N_SITE")
    if not chosen:
        return Site()
    path = Path(chosen) if chosen.endswith((".yaml", ".yml")) else SITES / f"{chosen}.yaml"
    if not path.is_file():
        names = sorted(known.stem for known in SITES.glob("*.yaml"))
        raise UserError(f"--site {chosen}: there is no {path}.{suggest(chosen, names)} Copy {SITES / 'example.yaml'}.")
    try:
        return Site.model_validate(yaml.safe_load(path.read_text()) or {})
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{path}: {_place(p)}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors())
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}") from None


def _place(problem: object) -> str:
    return ".".join(str(part) for part in problem["loc"])  # type: ignore[index]
