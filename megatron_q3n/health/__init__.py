"""What keeps a long run honest: bad steps, hangs, slow ranks. Watches the training; trains nothing itself.

    judge.py       is this step sound? policy for NaN, infinity and spikes; plain numbers in, a verdict out
    batch_order.py which batches are left out after a roll-back, and so which batch a step trains on
    hang.py        a thread that finds a rank without progress, writes every thread's stack and ends the process
    stragglers.py  each rank's own time per step, compared
    watch.py       the four put together, as the training loop wants them

The withheld update itself is in `training/guard.py`, beside the optimizer. The check of nodes before a run starts is in
`slurm/preflight.py`: it must work where nothing is installed.
"""
