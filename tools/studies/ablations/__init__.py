"""Ablations: several variants of a training, each with several seeds, and their results.

    recipe.py     recipes/ablation-*.yaml: question, variants, comparisons; checked before anything runs
    schedule.py   order of several studies' runs, and runs that studies share
    runs.py       a variant and seed as processes of megatron_q3n.train, resumed after an interruption
    outcomes.py   settings and outcome of each run on disk
    measures.py   numbers read from a run: a recorded metric, recall, spikes, divergence
    results.py    results.json and the table, over variants and seeds
    plots.py      one figure per study
    evidence.py   table and figure in docs/evidence.md
    archive.py    the records of studies as one file

The command is tools/studies/ablation.py. torch is not imported: the runs are other processes.
"""
