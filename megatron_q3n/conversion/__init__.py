"""Checkpoints from and to Hugging Face folders, file to file, without building a model.

`pieces` brings the two sides together: which box of which checkpoint tensor holds what of the
published ones, one expert at a time. `torch_dist` reads and writes megatron-core's file format,
`unfinished` makes a long conversion resumable and its output complete or absent. `importing` and
`exporting` are the two ways. Memory is bounded by the largest published tensor. No megatron-core
and no process group: a conversion runs on any machine with enough disk.
"""
