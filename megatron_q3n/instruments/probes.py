"""Probes of one forward pass: hooks on attention cores, layers, routers and delta rules.

**First-token share.** The attention core runs a second time on values that are 1 at each document's first token and 0
elsewhere; its output is the attention that each query pays to that token. This measures the kernel in use, with its
mask, window, packing and context parallelism, without a second softmax here. The first token's own query is left out,
because it attends to nothing else. Uniform attention over T visible tokens gives about ln(T)/T.
Reference: Gated Attention (arXiv 2505.06708), section 4.3.

**Massive activations.** The residual stream after each layer (mixer and MoE): its largest magnitude, its root mean
square, and the median magnitude of each token's channels, averaged over tokens. Reference: arXiv 2402.17762.

**Router entropy.** Entropy per token of the softmax over all experts' logits, divided by ln E: 1 is no preference.

**Decay.** The mean of -log decay over tokens, per head; ln 2 divided by it is the half-life of the head's state. The
Frobenius norm of the state is measured at the ends of sequences (of documents if packed).

**MTP.** A validation pass skips the MTP layer, or runs it as in drafting, without the attention core. Here it runs once
more at depth 1, on the text, and is reported as one more layer after the trunk's.

Shapes: S tokens of a rank, B sequences, H hidden size, E experts, D documents, h heads of a rank, K/V head dimensions.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_q3n.config import RunConfig
from megatron_q3n.instruments.tally import Shapes, Tally
from megatron_q3n.model.gated_delta_net import GatedDeltaNet
from megatron_q3n.model.moe.router import GlobalBatchRouter
from megatron_q3n.model.packed_params import packing_of
from megatron_q3n.model.pass_state import PassState
from megatron_q3n.packing import Packing


def tables(config: RunConfig) -> tuple[Shapes, Shapes]:
    """Return the shapes of the sums and maxima that the probes fill: a row for each layer, the last one for MTP."""
    rows, heads = config.model.num_layers + 1, config.model.linear_num_value_heads
    of_any_layer = ("first_token_share", "square", "median", "entropy", "state")
    sums: dict[str, tuple[int, ...]] = dict.fromkeys(of_any_layer, (rows, 2))
    return {**sums, "decay": (rows, heads, 2)}, {"activation": (rows,)}


@contextmanager
def attached(models: list[nn.Module], tally: Tally) -> Iterator[None]:
    """Attach the probes to the models inside the block; every forward pass there adds to the tally."""
    with ExitStack() as stack:
        for model in models:
            for sublayer in model.decoder.layers:  # type: ignore[union-attr]
                # a mixer and its MoE are one layer
                _attach_to_sublayer(sublayer, (sublayer.layer_number - 1) // 2, tally, stack)
            if model.mtp_process:
                hook = _draft_hook(tally)
                stack.callback(model.mtp.register_forward_hook(hook, with_kwargs=True).remove)  # type: ignore[union-attr]
        yield


def _attach_to_sublayer(sublayer: Any, row: int, tally: Tally, stack: ExitStack) -> None:
    for module in sublayer.modules():
        _attach(module, row, tally, stack)
    if sublayer.layer_number % 2 == 0:
        handle = sublayer.register_forward_hook(_residual_hook(row, tally))
        stack.callback(handle.remove)


def _draft_hook(tally: Tally) -> Callable[..., None]:
    """Return a hook that runs the MTP layer once, with probes, after the MTP block."""

    def run(block: Any, _: Any, inputs: dict[str, Any], __: Any) -> None:
        layer = block.layers[0]
        with ExitStack() as stack:
            for sublayer in layer.mtp_model_layer.layers:
                _attach_to_sublayer(sublayer, -1, tally, stack)
            layer(**inputs)

    return run


def _attach(module: nn.Module, layer: int, tally: Tally, stack: ExitStack) -> None:
    if isinstance(module, GlobalBatchRouter):
        pass_state: PassState = module.config.pass_state
        stack.enter_context(pass_state.with_routing({module: RouterProbe(module, layer, tally)}))
    elif isinstance(module, GatedDeltaNet):
        stack.enter_context(module.config.pass_state.probing({module: DeltaProbe(module, layer, tally)}))
    core = getattr(module, "core_attention", None)
    if isinstance(core, nn.Module):
        hook = _attention_hook(module.pg_collection.cp, layer, tally)  # type: ignore[union-attr]
        stack.callback(core.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _attention_hook(cp_group: ProcessGroup, layer: int, tally: Tally) -> Callable[..., None]:
    def hook(core: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        query, key, value, *others = inputs
        first = first_tokens(packing_of(options.get("packed_seq_params")), cp_group)
        indicator = torch.zeros_like(value)
        indicator[first] = 1
        output = core.forward(query, key, indicator, *others, **options)
        share = output.reshape(*query.shape[:-1], value.shape[-1])[..., 0].double()
        share[first] = 0
        tally.add("first_token_share", layer, share.sum(), share.numel() - share[first].numel())

    return hook


def first_tokens(packing: Packing | None, cp_group: ProcessGroup) -> Tensor:
    """Return the indices on this rank of the documents' first tokens; all are on the first context-parallel rank."""
    device = torch.cuda.current_device()
    if cp_group.rank() > 0:
        return torch.zeros(0, dtype=torch.int64, device=device)
    if packing is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    starts = [start // cp_group.size() for start, end in packing.spans if end > start]
    return torch.tensor(starts, dtype=torch.int64).to(device, non_blocking=True)


def _residual_hook(layer: int, tally: Tally) -> Callable[..., None]:
    def hook(_: Any, __: Any, output: Any) -> None:
        hidden_SBH = output[0] if isinstance(output, tuple) else output
        size = hidden_SBH.abs()
        tally.update_max("activation", layer, size.amax())
        norm = torch.linalg.vector_norm(size, dtype=torch.float32).double()
        tally.add("square", layer, norm.square(), size.numel())
        medians_SB = size.median(-1).values
        tally.add("median", layer, medians_SB.sum(dtype=torch.float64), medians_SB.numel())

    return hook


class RouterProbe:
    """Probe of a router: measures its logits and leaves its routing unchanged."""

    is_active = True

    def __init__(self, router: GlobalBatchRouter, layer: int, tally: Tally) -> None:
        self._below = router.config.pass_state.routing.get(router)
        self._layer, self._tally = layer, tally

    def run(self, router: Any, logits: Tensor, probs: Tensor, used_map: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the entropy of one pass; a RoutingReplay that was attached before still applies."""
        log_TE = torch.log_softmax(logits.reshape(-1, logits.shape[-1]).float(), dim=-1)
        entropy_T = -(log_TE.exp() * log_TE).sum(-1) / math.log(log_TE.shape[1])
        self._tally.add("entropy", self._layer, entropy_T.sum(dtype=torch.float64), len(entropy_T))
        if self._below is not None:
            return self._below.run(router, logits, probs, used_map)
        return probs, used_map


class DeltaProbe:
    """Probe of a delta rule: measures its decay and its final states."""

    def __init__(self, mixer: GatedDeltaNet, layer: int, tally: Tally) -> None:
        self._layer, self._tally = layer, tally
        tensor, context = mixer.tp_group, mixer.cp_group
        self._first_head = tensor.rank() * mixer.tp_heads.value_heads
        # with states passed between ranks, only the first rank holds chunks that end a document: the second of each
        self._chunked, self._holds_ends = mixer.passes_state, context.rank() == 0
        if not mixer.passes_state:
            self._first_head += context.rank() * mixer.tp_heads.value_heads // context.size()

    def wrap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Return the rule with the measurement added."""

        def run(*inputs: Tensor, **options: Any) -> Any:
            output, states_DhKV = rule(*inputs, **{**options, "output_final_state": True})
            self._measure(inputs[3], states_DhKV)
            return output, states_DhKV

        return run

    # the mixer may run its rule with gradients
    @torch.no_grad()
    def _measure(self, decay_BTh: Tensor, states_DhKV: Tensor) -> None:
        decay_sum_h = -decay_BTh.flatten(0, 1).sum(0, dtype=torch.float64)
        heads = slice(self._first_head, self._first_head + len(decay_sum_h))
        entry = self._tally.sums["decay"][self._layer, heads]
        entry[:, 0] += decay_sum_h
        entry[:, 1] += decay_BTh.shape[0] * decay_BTh.shape[1]
        if self._chunked:
            states_DhKV = states_DhKV[1::2] if self._holds_ends else states_DhKV[:0]
        norms_Dh = torch.linalg.vector_norm(states_DhKV.float(), dim=(-2, -1))
        self._tally.add("state", self._layer, norms_Dh.sum(dtype=torch.float64), norms_Dh.numel())
