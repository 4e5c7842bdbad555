"""Start-up checks of Gated DeltaNet: the fused mixer around the delta rule, and the decode step.

Each check returns the results of the fused kernel and of the reference; `qualification.py` compares them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_q3n.kernels.decode import gated_delta as decode_step
from megatron_q3n.kernels.gated_delta import mixer
from megatron_q3n.kernels.gated_delta.operands import DeltaHeads, DeltaWeights
from megatron_q3n.kernels.startup.check_inputs import NUM_TOKENS, Results, random, with_gradients
from megatron_q3n.packing import Packing


def check_mixer(heads: DeltaHeads, conv_kernel_size: int, packed: bool) -> tuple[Results, Results]:
    """Run the passes around the delta rule, with a simple function of all inputs in place of the rule."""
    width, channels = sum(heads.sections), sum(heads.sections[:3])
    repeat = heads.value_heads // heads.key_heads
    packing = Packing.of([0, 1, 70, NUM_TOKENS], "cuda") if packed else None

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: object) -> tuple[Tensor, None]:
        factor = (g.exp() * beta.float())[..., None]
        return (v * factor + (q * k).repeat_interleave(repeat, 2) * 9).to(v.dtype), None

    def run(mix: Callable[..., Tensor], x: Tensor, ba: Tensor, *vectors: Tensor) -> Tensor:
        return mix(x, ba, DeltaWeights(*vectors), heads, rule, packing)

    fp32 = torch.float32
    inputs = [
        random(NUM_TOKENS, 1 if packed else 2, width),
        random(NUM_TOKENS, 1 if packed else 2, 2 * heads.value_heads),
        random(channels, conv_kernel_size),
        random(heads.value_heads, dtype=fp32),
        random(heads.value_heads, dtype=fp32) + 1,
        0.1 * random(heads.value_dim, dtype=fp32),
    ]
    fused = with_gradients(partial(run, mixer.fused_delta_mixer), inputs)
    return fused, with_gradients(partial(run, mixer.delta_mixer_reference), inputs)


def check_decode_step(heads: DeltaHeads, conv_kernel_size: int) -> tuple[Results, Results]:
    """Run the decode step, which has no gradients: outputs and states of a few tokens of three sequences."""
    fp32, sequences = torch.float32, 3
    weights = DeltaWeights(
        random(sum(heads.sections[:3]), conv_kernel_size),
        random(heads.value_heads, dtype=fp32),
        random(heads.value_heads, dtype=fp32) + 1,
        0.1 * random(heads.value_dim, dtype=fp32),
    )
    inputs = (
        random(4, sequences, sum(heads.sections)),
        random(4, sequences, 2 * heads.value_heads),
        weights,
        heads,
        random(sequences, sum(heads.sections[:3]), conv_kernel_size - 1),
        random(sequences, heads.value_heads, heads.key_dim, heads.value_dim, dtype=fp32),
    )
    fused = decode_step.decode_gated_delta(*inputs, fused=True)
    return fused, decode_step.decode_gated_delta_reference(*inputs)
