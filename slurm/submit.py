"""Submission of a recipe or pipeline to Slurm: validate it, write the job files, and submit.

    python -m slurm.submit --config-name pretrain-tiny --site my-cluster [setting=value …]
    python -m slurm.submit --config-name pipeline-tiny --site my-cluster [stage.setting=value …]
    python -m slurm.submit --resume runs/pipeline-tiny-… [setting=value …]    resume after a failure
    … --dry-run     print the scripts; write and submit nothing
    … --local       run the same stages on this machine, in order, without Slurm

All inputs of a job are in its run directory: config.yaml, code/, slurm/job.sbatch, slurm/job.json.
"""

import argparse
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError
from megatron_q3n.recipe import RECIPES, configure, register_defaults
from slurm import jobs, pipeline, progress, script
from slurm.checks import check_run
from slurm.pipeline import PREFIX, Stage
from slurm.site import Site, load_site
from slurm.snapshot import take_snapshot


def main() -> int:
    """Run the command; return 0 if submitted (with --local: done), 2 for invalid input."""
    arguments = parse(sys.argv[1:])
    register_defaults()
    try:
        site = load_site(arguments.site)
        if arguments.local:
            site = replace_python(site)
        elif not arguments.dry_run:
            jobs.require_slurm()
        folder, stages = _resumed(arguments, site) if arguments.resume else _new(arguments, site)
        remaining = [stage for stage in stages if not stage.is_done]
        if arguments.dry_run:
            return _show(remaining, site)
        if not remaining:
            print(f"{folder}: nothing is left to do")
            return 0
        _write(folder, arguments.config_name, stages, remaining, site, arguments)
        if arguments.local:
            return _run_locally(folder, remaining)
        return _submit(folder, remaining)
    except UserError as error:
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
    parser.add_argument("--nodes", type=int, help="number of nodes of a recipe's job")
    parser.add_argument("--time", help="time limit of a recipe's job; the run may take several jobs")
    parser.add_argument("--dry-run", action="store_true", help="only print the scripts")
    parser.add_argument("--local", action="store_true", help="run on this machine, without Slurm")
    parser.add_argument("--update-code", action="store_true", help="with --resume: take a new snapshot of the code")
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    return parser.parse_intermixed_args(arguments)


def replace_python(site: Site) -> Site:
    """Return the site with this process's Python interpreter."""
    return site.model_copy(update={"python": sys.executable, "node_python": sys.executable})


def _new(arguments: argparse.Namespace, site: Site) -> tuple[Path, list[Stage]]:
    name = arguments.config_name.removesuffix(".yaml")
    folder = (arguments.run_dir or pipeline.new_folder("runs", name)).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--run-dir {folder} is not empty; to resume it: --resume {folder}")
    if not name.startswith(PREFIX):
        stage = _recipe_stage(arguments, site, name, folder, arguments.overrides, nodes=arguments.nodes)
        return folder, [replace(stage, code=folder / "code", time=arguments.time)]
    return folder, _pipeline_stages(arguments, site, name, folder)


def _pipeline_stages(arguments: argparse.Namespace, site: Site, name: str, folder: Path) -> list[Stage]:
    config_dir = Path(arguments.config_dir) if arguments.config_dir else RECIPES
    path = next((p for p in (config_dir / f"{name}.yaml", RECIPES / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        available = ", ".join(sorted(p.stem for p in RECIPES.glob(f"{PREFIX}*.yaml")))
        raise UserError(f"--config-name {name}: no such pipeline. Available: {available}.")
    recipe = pipeline.read_recipe(path)
    extra = pipeline.overrides_by_stage(arguments.overrides, list(recipe.stages))
    stages: list[Stage] = []
    for stage_name, spec in recipe.stages.items():
        run_dir, source = folder / stage_name, spec.begins_with and folder / spec.begins_with
        if spec.tool is not None:
            tool = [part.format_map({"from": source, "run_dir": run_dir}) for part in spec.tool]
            stage = Stage(stage_name, run_dir, folder / "code", tool=tool)
        else:
            overrides = [*spec.overrides, *extra[stage_name]]
            overrides += [f"checkpoint.load={source}"] if source else []
            before = next((s for s in stages if s.name == spec.begins_with), None)
            stage = _recipe_stage(
                arguments, site, spec.recipe or "", run_dir, overrides, nodes=spec.nodes, before=before
            )
        stages.append(
            replace(stage, name=stage_name, code=folder / "code", begins_with=spec.begins_with, time=spec.time)
        )
    return stages


def _recipe_stage(
    arguments: argparse.Namespace,
    site: Site,
    recipe: str,
    run_dir: Path,
    overrides: list[str],
    *,
    nodes: int | None,
    before: Stage | None = None,
) -> Stage:
    """Return the stage of a recipe, validated for this site."""
    command_line = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    command_line += ["--config-name", recipe, *overrides, f"run_dir={run_dir}"]
    if nodes:
        command_line.append(f"parallel.world_size={nodes * site.ranks_per_node}")
    config = configure(command_line)
    return _checked(Stage(recipe, run_dir, run_dir / "code", config), site, nodes, before)


def _checked(stage: Stage, site: Site, nodes: int | None, before: Stage | None) -> Stage:
    """Return the stage with its number of nodes, after checking that it can run."""
    assert stage.config is not None
    num_nodes = nodes or math.ceil(stage.config.world_size / site.ranks_per_node)
    before_config = before.config if before is not None else None
    check_run(stage.config, site, num_nodes, before_config, loads_later=before is not None)
    return replace(stage, num_nodes=num_nodes)


def _resumed(arguments: argparse.Namespace, site: Site) -> tuple[Path, list[Stage]]:
    """Return the stages of an existing directory, with changed settings for those that are not done."""
    folder = arguments.resume.resolve()
    lineage = pipeline.read_lineage(folder)
    is_single_run = not (folder / pipeline.FILE).is_file()
    names = [entry["name"] for entry in lineage]
    extra = (
        {names[0]: arguments.overrides} if is_single_run else pipeline.overrides_by_stage(arguments.overrides, names)
    )
    stages: list[Stage] = []
    for entry in lineage:
        run_dir = Path(entry["run_dir"])
        stage = Stage(
            entry["name"],
            run_dir,
            folder / "code",
            tool=entry.get("tool") or [],
            begins_with=entry["from"],
            num_nodes=entry.get("nodes", 1),
            time=arguments.time or entry.get("time"),
        )
        if not stage.tool:
            settings = list(extra[stage.name])
            if arguments.nodes:
                settings.append(f"parallel.world_size={arguments.nodes * site.ranks_per_node}")
            config = configure(["--resume", str(run_dir), *settings])
            stage = replace(stage, config=config)
            if not stage.is_done:
                before = next((s for s in stages if s.name == entry["from"]), None)
                stage = _checked(stage, site, arguments.nodes, before)
        _check_not_queued(stage)
        stages.append(stage)
    return folder, stages


def _check_not_queued(stage: Stage) -> None:
    ids = [str(line["job"]) for line in progress.attempts(stage.run_dir) if line.get("job")]
    for job_id, (state, _) in jobs.states(ids[-1:]).items():
        if jobs.is_active(state):
            raise UserError(f"{stage.name} is already job {job_id} ({state}); run scancel {job_id} first.")


def _show(stages: list[Stage], site: Site) -> int:
    for stage in stages:
        after = f", after {stage.begins_with} has completed" if stage.begins_with else ""
        print(f"# ---- {stage.name}: {stage.script_file}{after}")
        print(script.sbatch_script(stage, site))
        print(f"# {stage.job_file}\n{script.job_json(stage, site, local=False)}")
    print("dry run: nothing was written, nothing submitted")
    return 0


def _write(
    folder: Path,
    recipe: str | None,
    stages: list[Stage],
    remaining: list[Stage],
    site: Site,
    arguments: argparse.Namespace,
) -> None:
    """Write the code snapshot, pipeline.json, and the configuration, job.json and script of each remaining stage."""
    try:
        if arguments.update_code:
            shutil.rmtree(folder / "code")
        if not (folder / "code").is_dir():
            take_snapshot(folder / "code")
        if recipe is not None and recipe.startswith(PREFIX):
            pipeline.write_lineage(folder, recipe.removesuffix(".yaml"), stages)
        for stage in remaining:
            for name in ("logs", progress.SLURM_FOLDER):
                (stage.run_dir / name).mkdir(parents=True, exist_ok=True)
            if stage.config is not None:
                (stage.run_dir / "config.yaml").write_text(_config_text(stage.config))
            stage.job_file.write_text(script.job_json(stage, site, local=arguments.local))
            stage.script_file.write_text(script.sbatch_script(stage, site))
            if arguments.resume:
                progress.reset_attempts(stage.run_dir)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Choose another with --run-dir.") from None


def _config_text(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json") | {"run_dir": None}, sort_keys=False)


def _submit(folder: Path, stages: list[Stage]) -> int:
    """Submit each stage with a dependency on the stage that it loads from, unless that is already done."""
    job_of: dict[str, str] = {}
    for stage in stages:
        job_of[stage.name] = jobs.submit(stage.script_file, job_of.get(stage.begins_with or ""))
        progress.add_attempt_line(stage.run_dir, event="submitted", job=job_of[stage.name])
        print(f"job {job_of[stage.name]}  {stage.name}  {stage.run_dir}/logs/slurm-{job_of[stage.name]}.out")
    print(f"\ndirectory {folder}\nstatus    python -m slurm.status {folder}")
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
                + f"\nto resume: python -m slurm.submit --local --resume {folder}"
            )
            return code
    print(f"\ndirectory {folder}\nstatus    python -m slurm.status {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
