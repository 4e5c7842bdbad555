"""Health of a long run: bad steps, hangs and slow ranks. It observes the training and withholds single updates.

    step_check.py   detection of non-finite steps and loss spikes, and the action of the policy
    batch_order.py  the batch of each step, without the batches skipped after roll-backs
    hang.py         a thread that detects missing progress, writes all stacks and ends the process
    stragglers.py   each rank's own time per step, compared over ranks
    monitor.py      HealthMonitor: the four as one callback of the training loop

The call that withholds an update is in `training/guard.py`, at the optimizer. The check of nodes before a run starts is
in `slurm/preflight.py`, because it must work without the packages of this project.
"""
