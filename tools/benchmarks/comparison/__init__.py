"""Speed comparison behind tools/benchmarks/bench.py: contestants, shapes, timing, derived figures and tables.

    cases.py            shapes, and the configuration of a contestant
    ours.py, stock.py, huggingface.py    one contestant each
    worker.py           one contestant in its own process
    interleaving.py     order of the measurements, alternating between contestants
    findings.py         figures derived from the measurements
    kernel_groups.py    profile by groups of kernels
    tables.py           output
    steps.py, startup.py    measurements of this project alone

The package does not import it.
"""
