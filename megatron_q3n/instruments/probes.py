"""What listens to one forward pass: attention cores, layers, routers and delta rules.

**First-token share.** The attention core runs a second time on values that are 1 at each document's first token and 0
elsewhere: what comes out is the attention that every query gives to it. That asks the very kernel that runs, with its
mask, window, packing and context parallelism, and needs no second softmax here. The first token's own query, which
has no choice, is left out. An even spread over T visible tokens gives about ln(T)/T.
Reference: Gated Attention (arXiv 2505.06708), section 4.3.

**Massive activations.** The residual stream as it leaves a layer (mixer and experts): its largest magnitude, its root
mean square, and the median magnitude of each token's channels, averaged over tokens. Reference: arXiv 2402.17762.

**Router entropy.** Of the softmax over all experts' scores, per token, over ln E: 1 is no preference.

**Decay.** The mean of -log decay over tokens, per head; ln 2 over it is the half-life of what a head remembers. The
Frobenius norm of its state is taken at the ends of sequences (documents when packed).

**MTP.** A validation pass leaves its layer out, or runs it as it drafts, without the attention core. Here it is run
once more at depth 1, on the text, behind the trunk's layers as one more.

Shapes: S tokens of a rank, B rows, H width, E experts, D documents, h heads of a rank, K/V their dims.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_q3n.config import RunConfig
from megatron_q3n.instruments.tally import Shapes, Tally
from megatron_q3n.model.gated_delta_net import GatedDeltaNet
from megatron_q3n.model.moe.router import GlobalBatchRouter
from megatron_q3n.model.moe.routing_replay import RouteTape


def tables(config: RunConfig) -> tuple[Shapes, Shapes]:
    """Return the shapes of the sums and maxima that `listening` fills: a row for each layer, the last one for MTP."""
    rows, heads = config.model.num_layers + 1, config.model.linear_num_value_heads
    of_any_layer = ("first_token_share", "square", "median", "entropy", "state")
    sums: dict[str, tuple[int, ...]] = dict.fromkeys(of_any_layer, (rows, 2))
    return {**sums, "decay": (rows, heads, 2)}, {"activation": (rows,)}


@contextmanager
def listening(models: list[nn.Module], tally: Tally) -> Iterator[None]:
    """Gather from every pass inside the block."""
    with ExitStack() as stack:
        for model in models:
            for sublayer in model.decoder.layers:  # type: ignore[union-attr]
                # a mixer and its MoE are one layer
                _listen(sublayer, (sublayer.layer_number - 1) // 2, tally, stack)
            if model.mtp_process:
                look = _draft_hook(tally)
                stack.callback(model.mtp.register_forward_hook(look, with_kwargs=True).remove)  # type: ignore[union-attr]
        yield


def _listen(sublayer: Any, row: int, tally: Tally, stack: ExitStack) -> None:
    for module in sublayer.modules():
        _attach(module, row, tally, stack)
    if sublayer.layer_number % 2 == 0:
        handle = sublayer.register_forward_hook(_residual_hook(row, tally))
        stack.callback(handle.remove)


def _draft_hook(tally: Tally) -> Callable[..., None]:
    """Return what runs MTP's layer once, where the block has just been called."""

    def run(block: Any, _: Any, inputs: dict[str, Any], __: Any) -> None:
        layer = block.layers[0]
        with ExitStack() as stack:
            for sublayer in layer.mtp_model_layer.layers:
                _listen(sublayer, -1, tally, stack)
            layer(**inputs)

    return run


def _attach(module: nn.Module, layer: int, tally: Tally, stack: ExitStack) -> None:
    if isinstance(module, GlobalBatchRouter | GatedDeltaNet):
        tape = (RouterProbe if isinstance(module, GlobalBatchRouter) else DeltaProbe)(module, layer, tally)
        stack.callback(setattr, module, "tape", module.tape)
        module.tape = tape  # type: ignore[assignment]
    core = getattr(module, "core_attention", None)
    if isinstance(core, nn.Module):
        look = _attention_hook(module.pg_collection.cp, layer, tally)  # type: ignore[union-attr]
        hook = core.register_forward_pre_hook(look, with_kwargs=True)
        stack.callback(hook.remove)


def _attention_hook(cp_group: Any, layer: int, tally: Tally) -> Callable[..., None]:
    def look(core: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        query, key, value, *others = inputs
        packing = options.get("packed_seq_params")
        first = first_tokens(None if packing is None else packing.cu_seqlens_q, cp_group)
        mark = torch.zeros_like(value)
        mark[first] = 1
        seen = core.forward(query, key, mark, *others, **options)
        share = seen.reshape(*query.shape[:-1], value.shape[-1])[..., 0].double()
        share[first] = 0
        tally.add("first_token_share", layer, share.sum(), share.numel() - share[first].numel())

    return look


def first_tokens(cu_seqlens: Tensor | None, cp_group: Any) -> Tensor:
    """Return where on this rank the documents' first tokens lie: on the first context-parallel rank alone."""
    device = torch.cuda.current_device()
    if cp_group.rank() > 0:
        return torch.zeros(0, dtype=torch.int64, device=device)
    if cu_seqlens is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    return cu_seqlens[:-1][cu_seqlens.diff() > 0].long().to(device) // cp_group.size()


def _residual_hook(layer: int, tally: Tally) -> Callable[..., None]:
    def look(_: Any, __: Any, output: Any) -> None:
        hidden_SBH = output[0] if isinstance(output, tuple) else output
        size = hidden_SBH.abs()
        tally.raise_to("activation", layer, size.amax())
        norm = torch.linalg.vector_norm(size, dtype=torch.float32).double()
        tally.add("square", layer, norm.square(), size.numel())
        medians_SB = size.median(-1).values
        tally.add("median", layer, medians_SB.sum(dtype=torch.float64), medians_SB.numel())

    return look


class RouterProbe(RouteTape):
    """Sees a router's scores, and lets it choose as it would."""

    def __init__(self, router: GlobalBatchRouter, layer: int, tally: Tally) -> None:
        super().__init__()
        self._below, self._layer, self._tally = router.tape, layer, tally

    def run(self, router: Any, logits: Tensor, probs: Tensor, used_map: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the entropy of one pass; a tape that was there goes on."""
        log_TE = torch.log_softmax(logits.reshape(-1, logits.shape[-1]).float(), dim=-1)
        entropy_T = -(log_TE.exp() * log_TE).sum(-1) / math.log(log_TE.shape[1])
        self._tally.add("entropy", self._layer, entropy_T.sum(dtype=torch.float64), len(entropy_T))
        if self._below is not None:
            return self._below.run(router, logits, probs, used_map)
        return probs, used_map


class DeltaProbe:
    """Sees what enters a delta rule and the states it ends in."""

    def __init__(self, mixer: GatedDeltaNet, layer: int, tally: Tally) -> None:
        self._layer, self._tally = layer, tally
        tensor, context = mixer.tp_group, mixer.cp_group
        self._first_head = tensor.rank() * mixer.value_heads
        # passing states, only the first rank holds chunks that end a document: its second one of each
        self._chunked, self._holds_ends = mixer.passes_state, context.rank() == 0
        if not mixer.passes_state:
            self._first_head += context.rank() * mixer.value_heads // context.size()

    def heard(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Return the rule, gathering as it runs."""

        def run(*inputs: Tensor, **options: Any) -> Any:
            output, states_DhKV = rule(*inputs, **{**options, "output_final_state": True})
            self._gather(inputs[3], states_DhKV)
            return output, states_DhKV

        return run

    @torch.no_grad()  # whatever mode a mixer runs its rule in
    def _gather(self, decay_BTh: Tensor, states_DhKV: Tensor) -> None:
        forgotten_h = -decay_BTh.flatten(0, 1).sum(0, dtype=torch.float64)
        heads = slice(self._first_head, self._first_head + len(forgotten_h))
        entry = self._tally.sums["decay"][self._layer, heads]
        entry[:, 0] += forgotten_h
        entry[:, 1] += decay_BTh.shape[0] * decay_BTh.shape[1]
        if self._chunked:
            states_DhKV = states_DhKV[1::2] if self._holds_ends else states_DhKV[:0]
        norms_Dh = torch.linalg.vector_norm(states_DhKV.float(), dim=(-2, -1))
        self._tally.add("state", self._layer, norms_Dh.sum(dtype=torch.float64), norms_Dh.numel())
