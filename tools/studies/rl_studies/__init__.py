"""Studies of reinforcement learning: runs from fine-tuned checkpoints, and their evaluation.

    runs.py       recipes as processes of megatron_q3n.train, with time limits; continues interrupted runs
    mismatch.py   rewards and training–rollout mismatch of several runs: tables and a figure
    accuracy.py   held-out accuracy over time of several runs: table, figure and report

The commands are tools/studies/rl_study.py (a tiny model on CPUs) and tools/studies/rl_gpu.py (a small one on a GPU).
Nothing here imports torch; the runs are separate processes.
"""
