"""A look inside the model at a few steps: what its attention, residual stream, norms, routers and memories do.

`Instruments` is what the training loop calls. At its steps it runs a forward pass of its own, without gradients and
without a CUDA graph, over a part of the step's batch, as a validation would; hooks exist during that pass only. So an
ordinary step pays nothing, waits for nothing, and may be a captured graph. Gradient norms by layer are read where the
optimizer takes the whole gradient's norm.

Every number is global: each rank gathers (sum, count) pairs and maxima in one table of all layers, and two all-reduces
over all ranks close it. Duplicates (tensor-parallel copies of tokens or routers) then count in sum and count alike.

`probes` listens to a pass, `weights` reads norms and gradients, `tally` holds the table, `readings` names the numbers.
Alerts and pictures are metrics' affair.
"""

from megatron_q3n.instruments.instruments import Instruments

__all__ = ["Instruments"]
