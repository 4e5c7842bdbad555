"""Reinforcement learning from verifiable rewards.

prompts -> rollout -> scores -> advantages -> old log-probs -> policy loss -> optimizer step -> weight sync

`samples.py` holds the data that every phase reads and extends; each phase is a file; `loop.py` calls them. Worker
processes for scoring import this package, so it imports nothing here.
"""
