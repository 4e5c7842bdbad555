"""Training command: reads the command line and dispatches the checked configuration to its stage.

    python -m megatron_q3n.train --config-name pretrain-tiny [setting=value …]
    python -m megatron_q3n.train --resume runs/latest [setting=value …]

Started as a single process, by torchrun or by srun. A wrong setting is rejected before torch is imported. Hydra's own
flags (--cfg job, --multirun, --info, --help, --shell-completion) work too.
"""

import importlib
import sys
import time

from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, RunInUseError, UserError, launch
from megatron_q3n.recipe import configure, has_hydra_flag, register_defaults, run_by_hydra

STAGES = {
    "pretrain": "megatron_q3n.stages.pretrain",
    "longcontext": "megatron_q3n.stages.pretrain",
    "generate": "megatron_q3n.stages.generate",
    "sft": "megatron_q3n.stages.sft",
    "rl": "megatron_q3n.stages.rl",
    "serve": "megatron_q3n.stages.serve",
    "mtp": "megatron_q3n.stages.mtp",
    "evaluate": "megatron_q3n.stages.evaluate",
}
# A launcher ends all processes when the first one exits. The other ranks wait, so that the leader can print its error.
LEADER_MESSAGE_SECONDS = 20.0


def main() -> int:
    """Run the command line.

    Returns: the exit code, 0 done, 2 bad configuration or input, 75 stopped early with everything saved.
    """
    register_defaults()
    if has_hydra_flag(sys.argv[1:]):
        run_by_hydra(run)
        return 0
    try:
        return run(configure(sys.argv[1:]))
    except UserError as error:
        if _prints_messages():
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(LEADER_MESSAGE_SECONDS)
        return EXIT_BAD_INPUT


def _prints_messages() -> bool:
    """Return whether this process is the leader, or cannot know because the launcher's variables are unusable."""
    try:
        return launch.rank() == 0
    except UserError:
        return True


def run(config: RunConfig) -> int:
    """Run the stage of a configuration; with dry_run=true print its memory plan instead.

    Returns: the exit code.
    """
    preparation = importlib.import_module("megatron_q3n.stages.preparation")
    if config.dry_run:
        planner = importlib.import_module("megatron_q3n.planner")
        return planner.show(*preparation.rehearse(config))
    config = preparation.prepare(config)
    # first: compilation uses the other cores while torch and megatron-core are imported
    importlib.import_module("megatron_q3n.kernels.startup.compile_ahead").start(config)
    # imported here, so that torch and megatron-core are not imported for a dry run or a refused configuration
    importlib.import_module("megatron_q3n.device").quiet_known_warnings()
    run_directory = importlib.import_module("megatron_q3n.run_directory")
    stage = importlib.import_module(STAGES[config.stage])
    run_dir = run_directory.choose(config)
    try:
        code = stage.run(config, run_dir)
    # logs/outcome.json belongs to the process that trains there
    except RunInUseError:
        raise
    except UserError as error:
        run_directory.record_outcome(run_dir, EXIT_BAD_INPUT, str(error))
        raise
    except OSError as error:
        refusal = run_directory.full_disk_error(run_dir, error)
        if refusal is None:
            raise
        run_directory.record_outcome(run_dir, EXIT_BAD_INPUT, str(refusal))
        raise refusal from None
    run_directory.record_outcome(run_dir, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
