"""Hyperparameter sweep: Hydra multirun with each trial as a Slurm job, through submitit.

    python -m slurm.sweep --config-name pretrain-tiny --site my-cluster schedule.lr=1e-3,2e-3,4e-3 training.seed=1,2
    … --local       run the trials on this machine, one after the other

Translates the settings of the site to those of hydra-submitit-launcher and runs `megatron_q3n.train --multirun`. A
trial is one process on one node and is not requeued; for long runs and several nodes submit a recipe (slurm/submit.py).
The command waits for all trials and prints the command that compares them. Their run directories are in runs/sweep-….
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_q3n.config import EXIT_BAD_INPUT, UserError
from megatron_q3n.config.override_text import override
from slurm import jobs
from slurm.directives import check_folder, check_time
from slurm.pipeline import check_recipe_name, new_folder
from slurm.site import Site, load_site


def main() -> int:
    """Run the sweep; return Hydra's exit code, or 2 for invalid input."""
    arguments = parse(sys.argv[1:])
    try:
        recipe = check_recipe_name(arguments.config_name, "--config-name")
        folder = check_folder(new_folder(arguments.runs_dir, f"sweep-{recipe}"), "--runs-dir")
        if arguments.time is not None:
            check_time(arguments.time, "--time")
        site = load_site(arguments.site)
        if not arguments.local:
            _check_for_submitit(folder)
            jobs.leave_enclosing_job()
            jobs.require_slurm()
        launcher = [] if arguments.local else launcher_settings(site, arguments.time, _write_setup(folder, site))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    directories = [override("runs_dir", folder), override("hydra.sweep.dir", folder / "hydra")]
    name = ["--config-name", recipe, "--multirun"]
    command = [sys.executable, "-m", "megatron_q3n.train", *name, *launcher, *directories]
    code = subprocess.run([*command, *arguments.overrides], check=False).returncode
    print(f"\ntools/report.py --compare {shlex.quote(str(folder))}/{recipe}-*")
    return code


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-name", "-cn", required=True, metavar="RECIPE")
    parser.add_argument("--site", help="slurm/sites/SITE.yaml, or a path; default $Q3N_SITE")
    parser.add_argument("--runs-dir", default="runs", help="parent of the sweep's folder")
    parser.add_argument("--time", help="time limit of one trial")
    parser.add_argument("--local", action="store_true", help="run on this machine, without Slurm")
    parser.add_argument("overrides", nargs="+", metavar="setting=value,value")
    return parser.parse_intermixed_args(arguments)


def launcher_settings(site: Site, time: str | None, setup: Path) -> list[str]:
    """Return the overrides of hydra/launcher=submitit_slurm for the settings of the site; `setup`: its shell file."""
    settings: dict[str, str | int | list[str] | None] = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "timeout_min": minutes(time or site.time),
        "gpus_per_node": min(site.gpus_per_node, 1) or None,
        "cpus_per_task": site.cpus_per_process,
        # without this, the default of the plugin is requested, which most sites reject
        "mem_gb": None,
        "nodes": 1,
        "tasks_per_node": 1,
        "setup": [f". {shlex.quote(str(setup))}"],
    }
    overrides = [override(f"hydra.launcher.{name}", value) for name, value in settings.items()]
    return ["hydra/launcher=submitit_slurm", *overrides]


def _write_setup(folder: Path, site: Site) -> Path:
    """Write the site's setup and variables as a shell file, whose lines Hydra does not read; return its path."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    folder.mkdir(parents=True)
    path = folder / "setup.sh"
    path.write_text("\n".join([*site.setup, *exports, ""]), encoding="utf-8")
    return path


def minutes(time: str) -> int:
    """Return a Slurm time ([days-]hours:minutes:seconds, minutes:seconds or minutes) in whole minutes.

    Returns: at least one; 0, Slurm's value of no limit, for UNLIMITED and for zero.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return 0
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # the first of two numbers is minutes without days, and hours with days
    if not days and len(parts) < 3:
        parts.insert(0, 0)
    hours, mins, seconds, *_ = [*parts, 0, 0]
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)


def _check_for_submitit(folder: Path) -> None:
    # submitit replaces %x in file names, and Hydra resolves ${…} in the settings of a launcher more than once
    if found := next((text for text in ("%", "${") if text in str(folder)), None):
        raise UserError(f"--runs-dir: {folder} contains {found}, which submitit cannot name; choose another folder.")


if __name__ == "__main__":
    sys.exit(main())
