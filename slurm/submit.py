"""Submission of a recipe or pipeline to Slurm: validate it, write the job files, and submit.

    python -m slurm.submit --config-name pretrain-tiny --site my-cluster [setting=value …]
    python -m slurm.submit --config-name pipeline-tiny --site my-cluster [stage.setting=value …]
    python -m slurm.submit --resume runs/pipeline-tiny-… [setting=value …]    resume after a failure
    … --dry-run     print the scripts; write and submit nothing
    … --local       run the same stages on this machine, in order, without Slurm

All inputs of a job are in its run directory: config.yaml, code/, slurm/job.sbatch, slurm/job.json.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError
from megatron_q3n.recipe import register_defaults
from slurm import jobs, pipeline, progress, script
from slurm.directives import check_time
from slurm.pipeline import CODE, PREFIX, Stage
from slurm.site import Site, load_site
from slurm.snapshot import add_files, take_snapshot
from slurm.stages import new_stages, resumed_stages


def main() -> int:
    """Run the command; return 0 if submitted (with --local: done), 2 for invalid input."""
    arguments = parse(sys.argv[1:])
    register_defaults()
    try:
        check_arguments(arguments)
        site = load_site(arguments.site)
        if arguments.local:
            site = replace_python(site)
        else:
            jobs.leave_enclosing_job()
            if not arguments.dry_run:
                jobs.require_slurm()
        folder, stages = (resumed_stages if arguments.resume else new_stages)(arguments, site)
        remaining = [stage for stage in stages if not stage.is_done]
        if arguments.dry_run:
            return _show(remaining, site)
        if refused := _refused(remaining):
            raise UserError(refused)
        if not remaining:
            print(f"{folder}: nothing is left to do")
            return 0
        _write(folder, stages, remaining, site, arguments)
        if arguments.local:
            return _run_locally(folder, remaining)
        return _submit(folder, remaining)
    # messages of OSError contain the file name
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--config-name", "-cn", metavar="RECIPE", help="a recipe or pipeline")
    start.add_argument("--resume", type=Path, metavar="DIR", help="a run or pipeline directory")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="folder with your own recipes")
    parser.add_argument("--site", help="slurm/sites/SITE.yaml, or a path; default $Q3N_SITE")
    parser.add_argument("--run-dir", type=Path, help="the new directory (default runs/<recipe>-…)")
    parser.add_argument("--nodes", type=int, help="number of nodes of each recipe's job")
    parser.add_argument("--time", help="time limit of each job; a run may take several jobs")
    parser.add_argument("--dry-run", action="store_true", help="only print the scripts")
    parser.add_argument("--local", action="store_true", help="run on this machine, without Slurm")
    parser.add_argument("--update-code", action="store_true", help="with --resume: take a new snapshot of the code")
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    return parser.parse_intermixed_args(arguments)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Check the options that are no settings.

    Raises: UserError for a value that is not possible, or an option that has no effect beside the others.
    """
    if arguments.nodes is not None and arguments.nodes < 1:
        raise UserError(f"--nodes {arguments.nodes}: at least one node is needed.")
    if arguments.time is not None:
        check_time(arguments.time, "--time")
    resumed = arguments.resume is not None
    for option, value in (("--run-dir", arguments.run_dir), ("--config-dir", arguments.config_dir)):
        if resumed and value is not None:
            raise UserError(f"{option} {value} has no effect with --resume, which continues in its directory.")
    if arguments.update_code and not resumed:
        raise UserError("--update-code is for --resume; a new run always takes a snapshot of the code.")
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise UserError(f"--config-dir {arguments.config_dir}: no such folder. Give the folder of your recipes.")


def replace_python(site: Site) -> Site:
    """Return the site with this process's Python interpreter."""
    return site.model_copy(update={"python": sys.executable, "node_python": sys.executable})


def _refused(stages: list[Stage]) -> str:
    """Return the problems of the stages, empty if there are none."""
    return "\n".join(
        problem if len(stages) == 1 else f"stage {stage.name}: {problem}"
        for stage in stages
        if (problem := stage.problem) is not None
    )


def _show(stages: list[Stage], site: Site) -> int:
    """Print the files of every job, and then what would be refused."""
    for stage in stages:
        after = f", after {stage.begins_with} has completed" if stage.begins_with else ""
        print(f"# ---- {stage.name}: {stage.script_file}{after}")
        print(script.sbatch_script(stage, site))
        print(f"# {stage.job_file}\n{script.job_json(stage, site, local=False)}")
    print("dry run: nothing was written, nothing submitted", flush=True)
    if refused := _refused(stages):
        raise UserError(f"would be refused: {refused}")
    return 0


def _write(
    folder: Path, stages: list[Stage], remaining: list[Stage], site: Site, arguments: argparse.Namespace
) -> None:
    """Write the code snapshot, pipeline.json, and the configuration, job.json and script of each remaining stage."""
    recipe = arguments.config_name
    try:
        _write_code(folder / CODE, remaining, take_new=arguments.update_code)
        if recipe is not None and recipe.startswith(PREFIX):
            pipeline.write_lineage(folder, recipe.removesuffix(".yaml"), stages)
        for stage in remaining:
            for name in ("logs", progress.SLURM_FOLDER):
                (stage.run_dir / name).mkdir(parents=True, exist_ok=True)
            if stage.config is not None:
                (stage.run_dir / "config.yaml").write_text(_config_text(stage.config), encoding="utf-8")
            stage.job_file.write_text(script.job_json(stage, site, local=arguments.local), encoding="utf-8")
            stage.script_file.write_text(script.sbatch_script(stage, site), encoding="utf-8")
            if arguments.resume:
                progress.reset_attempts(stage.run_dir)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Choose another with --run-dir.") from None


def _write_code(code: Path, stages: list[Stage], *, take_new: bool) -> None:
    if take_new and code.exists():
        shutil.rmtree(code)
    if not code.is_dir() and (left_out := take_snapshot(code)):
        print(
            f"not in the code snapshot, because git does not track them: {', '.join(left_out)}. If the job needs one, "
            "git add it and submit again."
        )
    for stage in stages:
        add_files(code, stage.user_files)


def _config_text(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json") | {"run_dir": None}, sort_keys=False)


def _submit(folder: Path, stages: list[Stage]) -> int:
    """Submit each stage with a dependency on the stage that it loads from, unless that is already done."""
    job_of: dict[str, str] = {}
    for stage in stages:
        job_of[stage.name] = jobs.submit(stage.script_file, job_of.get(stage.begins_with or ""))
        progress.add_attempt_line(stage.run_dir, event="submitted", job=job_of[stage.name])
        print(f"job {job_of[stage.name]}  {stage.name}  {stage.run_dir}/logs/slurm-{job_of[stage.name]}.out")
    _print_directory(folder)
    return 0


def _run_locally(folder: Path, stages: list[Stage]) -> int:
    for index, stage in enumerate(stages):
        print(f"---- {stage.name}", flush=True)
        command = [sys.executable, "-m", "slurm.supervise", str(stage.job_file)]
        code = subprocess.run(command, cwd=stage.code, check=False).returncode
        if code:
            not_started = ", ".join(later.name for later in stages[index + 1 :])
            print(
                f"{stage.name} ended with code {code}"
                + (f"; not started: {not_started}" if not_started else "")
                + f"\nto resume: python -m slurm.submit --local --resume {shlex.quote(str(folder))}"
            )
            return code
    _print_directory(folder)
    return 0


def _print_directory(folder: Path) -> None:
    print(f"\ndirectory {folder}\nstatus    python -m slurm.status {shlex.quote(str(folder))}")


if __name__ == "__main__":
    sys.exit(main())
