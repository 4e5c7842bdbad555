"""Try settings against each other: Hydra's multirun, each trial a Slurm job of its own by submitit.

    python -m slurm.sweep --config-name pretrain-tiny --site my-cluster schedule.lr=1e-3,2e-3,4e-3 training.seed=1,2
    … --local       one after the other, here

A thin hand: it turns the site's settings into those of hydra-submitit-launcher and calls the training door with
--multirun. Trials are short and independent, each is one process on one node, and they are not requeued: for runs that
must survive, and for several nodes, submit a recipe (slurm/submit.py). The command waits for all trials. Their run
directories lie together in runs/sweep-…; the line it ends with shows them side by side.
"""

import argparse
import subprocess
import sys

from megatron_q3n.config import EXIT_BAD_INPUT, UserError
from slurm import jobs
from slurm.pipeline import new_folder
from slurm.site import Site, load_site


def main() -> int:
    """Run the sweep; Hydra's exit code, 2 when refused."""
    given = parse(sys.argv[1:])
    try:
        site = load_site(given.site)
        if not given.local:
            jobs.require_slurm()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    folder = new_folder(given.runs_dir, f"sweep-{given.config_name}")
    places = [f"runs_dir={folder}", f"hydra.sweep.dir={folder}/hydra"]
    launcher = [] if given.local else launcher_settings(site, given.time)
    name = ["--config-name", given.config_name, "--multirun"]
    command = [sys.executable, "-m", "megatron_q3n.train", *name, *launcher, *places]
    code = subprocess.run([*command, *given.overrides], check=False).returncode
    print(f"\ntools/report.py --compare {folder}/{given.config_name}-*")
    return code


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-name", "-cn", required=True, metavar="RECIPE")
    parser.add_argument("--site", help="slurm/sites/SITE.yaml, or a path; else $Q3N_SITE")
    parser.add_argument("--runs-dir", default="runs", help="parent of the sweep's folder")
    parser.add_argument("--time", help="time limit of one trial")
    parser.add_argument("--local", action="store_true", help="run here, without Slurm")
    parser.add_argument("overrides", nargs="+", metavar="setting=value,value")
    return parser.parse_intermixed_args(arguments)


def launcher_settings(site: Site, time: str | None) -> list[str]:
    """Return the overrides of hydra/launcher=submitit_slurm that say what the site says."""
    settings: dict[str, object] = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "timeout_min": minutes(time or site.time),
        "gpus_per_node": min(site.gpus_per_node, 1) or None,
        "cpus_per_task": site.cpus_per_process,
        "mem_gb": None,  # the plugin's own default is a request most sites refuse
        "nodes": 1,
        "tasks_per_node": 1,
    }
    overrides = [f"hydra.launcher.{name}={'null' if value is None else value}" for name, value in settings.items()]
    exports = [f"export {name}={value}" for name, value in site.environment.items()]
    if lines := [*site.setup, *exports]:
        quoted = ", ".join(f"'{line}'" for line in lines)
        overrides.append(f"hydra.launcher.setup=[{quoted}]")
    return ["hydra/launcher=submitit_slurm", *overrides]


def minutes(time: str) -> int:
    """Return Slurm's [days-]hours:minutes:seconds, minutes:seconds or minutes as whole minutes, at least one."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not days and len(parts) < 3:
        parts.insert(0, 0)  # without days the first of two is minutes, with days it is hours
    hours, mins, seconds, *_ = [*parts, 0, 0]
    return max(1, int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0))


if __name__ == "__main__":
    sys.exit(main())
