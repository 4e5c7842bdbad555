"""Sandbox of reward workers: namespaces, Landlock, seccomp and resource limits, each where the machine has it.

Scoring functions evaluate text that a model has written, so their processes are untrusted. `confinement.py` applies
every measure that is available and reports which are not. Linux only; elsewhere only the resource limits apply.
"""
