"""Ablations: the same model trained several ways, each with several seeds, and what came of it.

    recipe.py     recipes/ablation-*.yaml: the question, the variants, what is compared; checked before anything runs
    schedule.py   the order of several studies' runs, and which of them are one and the same
    runs.py       a variant and a seed as processes of megatron_q3n.train; goes on where it was interrupted
    outcomes.py   what each run on disk was made of, and how it ended
    measures.py   what is read of a run: a recorded metric, recall, spikes, whether it diverged
    results.py    results.json and the table, over variants and seeds
    plots.py      one picture of a study
    evidence.py   the table and the picture in docs/evidence.md
    archive.py    the records of studies as one file

The command is tools/studies/ablation.py. No torch here: it is the runs that compute.
"""
