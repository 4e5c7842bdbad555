"""Site settings of a cluster: one YAML file, selected with --site NAME_OR_PATH or $Q3N_SITE.

A name refers to slurm/sites/NAME.yaml. sites/example.yaml shows the settings.
"""

import os
import re
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_q3n.config import UserError, suggest
from megatron_q3n.config.credentials import is_secret_name, refers_only
from megatron_q3n.config.section import Section
from slurm.credential_rules import find as find_credential
from slurm.directives import check_line, check_time
from slurm.yaml_files import read_mapping

SITES = Path(__file__).parent / "sites"
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


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
    time: str = Field(
        "24:00:00", description="time limit of one job, UNLIMITED for none; the run continues after a requeue"
    )
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

    @model_validator(mode="after")
    def _is_writable(self) -> "Site":
        """Check every text: it becomes part of job scripts, which others may read."""
        for name, value in self._texts():
            if not name.startswith(("setup", "environment")):
                check_line(value, f"site: {name}")
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise UserError(f"site: environment: {name!r} is not a variable's name (letters, digits and _).")
        if self.node_python.strip() == "" or self.python.strip() == "":
            raise UserError("site: python and node_python name a program; leave them out for the default.")
        self._check_credentials()
        return self

    def _check_credentials(self) -> None:
        for name, value in self.environment.items():
            if is_secret_name(name) and not refers_only(value):
                raise UserError(
                    f"site: environment.{name} looks like a secret; it would be written into the run directory. "
                    "Log in on the cluster (wandb login), or export it in the shell from which you submit."
                )
        texts = [*self._texts(), ("sbatch_arguments", " ".join(self.sbatch_arguments))]
        for name, value in [*texts, ("srun_arguments", " ".join(self.srun_arguments))]:
            if found := find_credential(value):
                raise UserError(
                    f"site: {name} sets {found}, which looks like a secret; it would be written into the job script. "
                    "Read it in a setup line from a file that only you can read: export NAME=$(cat FILE)."
                )

    def _texts(self) -> list[tuple[str, str]]:
        """Return (setting, text) of every text in the settings."""
        texts = []
        for name, value in self:
            if isinstance(value, str):
                texts.append((name, value))
            elif isinstance(value, list):
                texts += [(name, item) for item in value]
            elif isinstance(value, dict):
                texts += [(f"{name}.{key}", item) for key, item in value.items()]
        return texts

    @field_validator("time")
    @classmethod
    def _is_time(cls, time: str) -> str:
        return check_time(time, "site: time")

    @field_validator("setup")
    @classmethod
    def _no_directives(cls, lines: list[str]) -> list[str]:
        for line in "\n".join(lines).splitlines():
            if line.lstrip().startswith("#SBATCH"):
                raise UserError(f"site: setup: {line.strip()!r} is an option of sbatch; list it in sbatch_arguments.")
        return lines

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
        return Site.model_validate(read_mapping(path))
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{path}: {_location(p)}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors())
        ) from None


def _location(problem: object) -> str:
    return ".".join(str(part) for part in problem["loc"])  # type: ignore[index]
