"""sbatch script of one stage, and job.json, the job description that the supervisor reads."""

import json
import shlex
from typing import Any

from megatron_q3n.config import RunConfig
from slurm.directives import directive, output_pattern
from slurm.pipeline import Stage
from slurm.site import Site


def job_description(stage: Stage, site: Site, *, local: bool) -> dict[str, Any]:
    """Return the job description for slurm/supervise.py."""
    preflight = None
    if site.preflight is not None and not local:
        expected = site.preflight.gpus_expected
        preflight = site.preflight.model_dump() | {
            "gpus_expected": site.gpus_per_node if expected is None else expected,
            "master_address": site.master_address,
        }
    return {
        "name": stage.name,
        "run_dir": str(stage.run_dir),
        "code": str(stage.code),
        "command": command(stage, site.python),
        "steps": stage.config.training.steps if stage.config else None,
        "time": stage.time,
        "nodes": stage.num_nodes,
        "processes_per_node": _processes(stage),
        "launcher": "local" if local else site.launcher,
        "srun_arguments": site.srun_arguments,
        "master_address": site.master_address,
        "node_python": site.node_python,
        "environment": {"PYTHONPATH": _python_path(stage, site), **_environment(stage, site)},
        "attempts_without_progress": site.attempts_without_progress,
        "max_excluded_nodes": site.max_excluded_nodes,
        "preflight": preflight,
    }


def command(stage: Stage, python: str) -> list[str]:
    """Return the command of one rank of a stage."""
    if stage.config is not None:
        return [python, "-m", "megatron_q3n.train", "--resume", str(stage.run_dir)]
    return [python, *stage.tool]


def sbatch_script(stage: Stage, site: Site) -> str:
    """Return the job script."""
    lines = ["#!/bin/bash", *(directive(option) for option in _options(stage, site))]
    # these are written as sbatch reads them, with quotes of their own
    lines += [f"#SBATCH {argument}" for argument in site.sbatch_arguments]
    lines += ["", "# setup of this site", *site.setup]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _environment(stage, site).items()]
    lines += [
        "",
        "# snapshot of the code at submission; the supervisor is documented in slurm/supervise.py",
        f"cd {shlex.quote(str(stage.code))}",
        f"export PYTHONPATH={shlex.quote(_python_path(stage, site))}",
        f"exec {shlex.quote(site.node_python)} -m slurm.supervise {shlex.quote(str(stage.job_file))}",
    ]
    return "\n".join([*lines, ""])


def job_json(stage: Stage, site: Site, *, local: bool) -> str:
    """Return the text of job.json."""
    return json.dumps(job_description(stage, site, local=local), indent=1) + "\n"


def _options(stage: Stage, site: Site) -> list[str]:
    per_node = _processes(stage)
    tasks = 1 if site.launcher == "torchrun" else per_node
    values = {
        "job-name": stage.name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": stage.num_nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": site.cpus_per_process * per_node // tasks,
        "gpus-per-node": site.gpus_per_node or None,
        "mem": site.memory_per_node,
        "time": stage.time or site.time,
        "signal": f"B:USR1@{site.save_margin_seconds}",
        "output": output_pattern(stage.run_dir / "logs"),
        "open-mode": "append",
    }
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return [*options, "--requeue"]


def _processes(stage: Stage) -> int:
    config: RunConfig | None = stage.config
    return max(1, config.world_size // stage.num_nodes) if config else 1


def _environment(stage: Stage, site: Site) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1"} if site.gpus_per_node == 0 else {}
    return {**threads, **{k: v for k, v in site.environment.items() if k != "PYTHONPATH"}}


def _python_path(stage: Stage, site: Site) -> str:
    return ":".join(filter(None, [str(stage.code), site.environment.get("PYTHONPATH")]))
