"""Studies of reinforcement learning: fine-tuned starts, runs that learn from reward, and what came of them.

    runs.py       a recipe as a process of megatron_q3n.train, within limits of time; goes on where it was interrupted
    mismatch.py   reward and mismatch of several runs side by side: tables and a picture
    accuracy.py   held-out accuracy over time of several runs: table, picture and report

The commands are tools/studies/rl_study.py (a tiny model on CPUs) and tools/studies/rl_gpu.py (a small one on a GPU). No torch here: it
is the runs that compute.
"""
