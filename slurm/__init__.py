"""Slurm integration: recipes and pipelines as jobs on a cluster, or as the same steps on one machine.

    submit.py      the main command: write the job files, submit
    stages.py      stages of a submission, validated for the site
    pipeline.py    recipes/pipeline-*.yaml: stages, and the checkpoint that each loads
    site.py        settings of a cluster, one YAML file per cluster (sites/)
    yaml_files.py  reader of site and pipeline files
    checks.py      checks before submission
    snapshot.py    copy of the code in the run directory, from which the job runs
    user_code.py   the user's own modules that a recipe names, for the snapshot
    script.py      the sbatch script
    directives.py  its #SBATCH lines, and checks of values that become part of them
    credential_rules.py  what looks like a credential and must not be written
    jobs.py        calls of sbatch and squeue
    supervise.py   supervisor in the job: start, monitor, requeue or give up     (standard library only)
    preflight.py   check of every node before training: GPUs, disk, network      (standard library only)
    progress.py    files that record the progress and the attempts of a run      (standard library only)
    status.py      status table of a run or pipeline
    sweep.py       Hydra multirun with the settings of the site

The training code does not depend on this folder: a job runs `python -m megatron_q3n.train --resume RUN_DIR`, which also
works outside Slurm. The modules marked "standard library only" run with any `python3` (3.9 or newer) of the node,
outside containers.
"""
