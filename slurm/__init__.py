"""Running recipes and pipelines on a Slurm cluster, or through the same steps on one machine.

    submit.py      the one command: validate, write, submit
    pipeline.py    recipes/pipeline-*.yaml: stages, and which checkpoint each begins with
    site.py        what is particular to a cluster, one YAML file each (sites/)
    checks.py      what is refused before an allocation is spent on it
    snapshot.py    the copy of the code that a run keeps and runs from
    script.py      the sbatch script
    jobs.py        calls of sbatch and squeue
    supervise.py   runs in the job: start, watch, requeue or give up       (standard library only)
    preflight.py   runs on every node before training: GPUs, disk, network (standard library only)
    progress.py    how far a run is, and the attempts made                 (standard library only)
    status.py      all that, for people
    sweep.py       Hydra's multirun with the site's settings

Training knows nothing of this folder: a job runs `python -m megatron_q3n.train --resume RUN_DIR`, as a person would.
The modules marked so run with whatever `python3` (3.9 or newer) the node has, outside any container.
"""
