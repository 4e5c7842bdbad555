"""Measurements inside the model at a few steps: attention sinks, residual stream, norms, routers, Gated DeltaNet state.

`Instruments` is a callback of the training loop. At its steps it runs a forward pass of its own, without gradients and
without a CUDA graph, over a part of the step's batch, as a validation would; hooks exist during that pass only. Any
other step has no overhead and no host synchronization, and may be a captured graph. Gradient norms by layer are read
where the optimizer computes the norm of the whole gradient.

Every metric is global: each rank fills (sum, count) pairs and maxima in one table of all layers, and two all-reduces
over all ranks complete it. Duplicates (tensor-parallel copies of tokens or routers) are counted in both sum and count.

`probes` are the hooks of a pass, `weights` reads norms and gradients, `tally` is the table, `readings` names the
metrics. Alerts and plots are in metrics/.
"""

from megatron_q3n.instruments.instruments import Instruments

__all__ = ["Instruments"]
