"""Reinforcement learning on answers that can be graded.

prompts -> rollout -> rewards -> advantages -> old probabilities -> policy loss -> step -> the same weights

`samples.py` is what travels; each verb is a file; `stages/rl.py` is the loop. Grading runs in processes of
its own, which import this room, so nothing is imported here.
"""
