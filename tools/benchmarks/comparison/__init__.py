"""What tools/benchmarks/bench.py is made of: who is compared, on what shapes, how it is timed, and how it is shown.

`cases` names the shapes; `ours`, `stock` and `huggingface` each build one contestant; `worker` runs one
contestant in a process of its own; `referee` lets them take turns; `findings` computes what follows from the
readings; `tables` prints. `steps` and `startup` measure this project alone. Nothing here is imported by the
package.
"""
