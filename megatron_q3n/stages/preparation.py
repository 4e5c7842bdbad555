"""Preparation of a run before torch is imported: what can be refused or completed by reading files alone.

A dry run is prepared too. Its plan is for another machine as often as for this one, so inputs that are missing here are
listed beside the plan (`rehearse`), while what would be refused everywhere is refused.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from megatron_q3n import checkpoint
from megatron_q3n.checkpoint import integrity
from megatron_q3n.config import RunConfig, UserError, launch, validate
from megatron_q3n.config.paths import EXPRESSION, existing, path_settings
from megatron_q3n.config.start_model import vocabulary_for, with_saved_model
from megatron_q3n.config.user_code import check_definition
from megatron_q3n.data.blend import load_blends
from megatron_q3n.data.manifest import Manifest
from megatron_q3n.data.run_inputs import InputRecord, check_same_inputs, data_sections
from megatron_q3n.data.tokenizer import TextTokenizer

# they read a checkpoint, and have no run directory of their own
WITHOUT_RUN_DIRECTORY = ("generate", "serve", "evaluate")


def prepare(config: RunConfig) -> RunConfig:
    """Return the configuration of a run with its start checkpoint found, after checking what it reads.

    Raises: UserError for missing or unusable inputs, and for data that changed since a resumed run began.
    """
    _check_launcher(config)
    if config.stage in WITHOUT_RUN_DIRECTORY:
        _refuse(missing_inputs(config))
        return _with_start(config)
    run_dir = Path(config.run_dir) if config.run_dir is not None else None
    if run_dir is not None:
        checkpoint.check_not_lost(run_dir)
    if run_dir is not None and checkpoint.newest_in(run_dir) is not None:
        return _resumed(config, run_dir)
    if config.data.accept_changed_contents:
        raise UserError(
            "data.accept_changed_contents=true has no effect on a new run, which has no contents to compare; set it "
            "to false."
        )
    _refuse(missing_inputs(config))
    return _checked(_with_start(config))


def rehearse(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the configuration that a dry run plans, and what the run would lack on this machine.

    Raises: UserError for what would be refused on every machine.
    """
    problems = missing_inputs(config)
    return (config, problems) if problems else (_checked(_with_start(config)), [])


def missing_inputs(config: RunConfig) -> list[str]:
    """Return a message for each input that is not on this machine."""
    problems = []
    try:
        _start(config)
    except UserError as error:
        problems.append(f"checkpoint.load={error}")
    sections = data_sections(config)
    for name, path, mark in path_settings(config):
        is_used = mark.role == "input" or (mark.role == "data" and name.partition(".")[0] in sections)
        if not is_used or name == "checkpoint.load" or EXPRESSION in path or existing(path):
            continue
        advice = "Correct the path."
        if name.startswith("data."):
            advice = f"Create it with tools/prepare_data.py --output {shlex.quote(path)}."
        problems.append(f"{name}={path} does not exist. {advice}")
    return problems


def _check_launcher(config: RunConfig) -> None:
    """Refuse a layout of several processes in a process that was started alone."""
    # read here, so that variables that are no numbers are refused before anything uses them
    launch.rank(), launch.local_rank()
    if config.world_size > 1 and not launch.has_rendezvous():
        command = shlex.join(["torchrun", "--nproc-per-node", str(config.world_size), "-m", "megatron_q3n.train"])
        raise UserError(
            f"parallel.world_size={config.world_size}, but this process was started alone. Start all of them: "
            f"{command} {shlex.join(sys.argv[1:])} (on several machines with srun, see slurm/README.md), or choose "
            "parallel=single."
        )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError(" ".join(problems))


def _resumed(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration of a run that goes on, with the start checkpoint that it began with."""
    # the leader alone reads the files: its exit ends the other processes
    if launch.rank() == 0:
        check_same_inputs(run_dir, config)
    record = InputRecord.read(run_dir)
    return config if record is None else _load_from(config, record.start_checkpoint)


def _checked(config: RunConfig) -> RunConfig:
    """Return the configuration with its model completed, after checking what else the run needs.

    Raises: UserError for a model that does not fit checkpoint or tokenizer, for unusable text, and for definitions of
        users that do not exist.
    """
    config = _with_model(config)
    if data_sections(config) == ["data"] and config.data.source == "blend":
        load_blends(config)
    for index, callback in enumerate(config.callbacks):
        module, _, name = callback.path.rpartition(".")
        check_definition(f"callbacks[{index}]: path={callback.path}", module, name)
    function = config.rl.reward.function
    if config.stage == "rl" and function is not None:
        module, _, name = function.partition(":")
        check_definition(f"rl.reward.function={function}", module, name)
    return config


def _with_model(config: RunConfig) -> RunConfig:
    """Return the configuration with the start checkpoint's model, or with a vocabulary that holds the tokenizer."""
    if config.checkpoint.load is not None:
        source = Path(config.checkpoint.load)
        manifest = integrity.read_manifest(source)
        config = with_saved_model(config, manifest["model"])
        checkpoint.check_architecture(manifest, config.model, source)
        return config
    model = config.model.model_dump(mode="json")
    model["vocab_size"] = vocabulary_for(model, config.own_model_settings, _tokenizer_size(config))
    is_changed = model["vocab_size"] != config.model.vocab_size
    return validate(config.model_dump(mode="json") | {"model": model}) if is_changed else config


def _tokenizer_size(config: RunConfig) -> int:
    """Return the size of the tokenizer that a run from fresh weights reads; 0 if it trains one."""
    if data_sections(config) != ["data"]:
        setting = config.data.tokenizer
        return TextTokenizer.load(setting).vocab_size if setting is not None else 0
    return Manifest.read(Path(config.data.train[0].path)).tokenizer.vocab_size if config.data.train else 0


def _with_start(config: RunConfig) -> RunConfig:
    """Return the configuration with the very checkpoint that it starts from: a run's newest one changes."""
    return _load_from(config, _start(config))


def _start(config: RunConfig) -> str | None:
    return None if config.checkpoint.load is None else str(checkpoint.find(config.checkpoint.load))


def _load_from(config: RunConfig, start: str | None) -> RunConfig:
    section: Any = config.checkpoint.model_copy(update={"load": start})
    return config.model_copy(update={"checkpoint": section})
