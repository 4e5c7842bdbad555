"""Whether a model can say again what it has just read, a probe of its memory: random tokens, then the same again.

A row is the token between documents, then L tokens, then the same L. Each is drawn on its own from held-out text, so
that frequencies are the text's and nothing else is: what is predicted of the second copy beyond the first is recalled.
Softmax attention does it by induction heads (Olsson et al., arXiv 2209.11895); a recurrent state is of one size, so
from some length on it must fail (Jelassi et al., arXiv 2402.01032). Untrained on the task: zero-shot.

Not counted is the first token of each copy: nothing tells when the repetition begins. A row is a function of text,
seed, length and its number, the same in every layout. Sums are over this rank's rows, as in `held_out`.

Shapes: N rows, L tokens of a copy, T = 2 L, V vocabulary, X hidden size.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_q3n.inference.passes import Passes
from megatron_q3n.inference.sampling import Sampling, likeliest
from megatron_q3n.model.decode.forward import generating

COPIES = ("first", "second")
COUNTED = ("nats", "right", "tokens")
POSITIONS_AT_ONCE = 2048  # logits held at a time: 1.2 GB in fp32 over 152k words


def repeated_rows(text: np.ndarray, eod: int, length: int, numbers: Iterable[int], seed: int) -> Tensor:
    """Return the rows of these numbers [N, 2 L + 1]: `eod`, then twice the same `length` tokens of the text."""
    words = text[text != eod]
    rows = []
    for number in numbers:
        places = np.random.default_rng([seed, length, number]).integers(len(words), size=length)
        rows.append(np.concatenate([[eod], words[places], words[places]]))
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def measure_recall(model: Any, batches: list[tuple[Tensor, Tensor]], vocab_size: int) -> Tensor:
    """Run repeated rows [N, 2 L + 1], each with whether it counts [N], and add up.

    Ranks that share experts bring equally many batches. `vocab_size`: ids from there on are padding.
    Returns: [2,3], COPIES by COUNTED, fp64, on the CPU.
    """
    passes = Passes(model, 0)
    sums = torch.zeros(len(COPIES), len(COUNTED), dtype=torch.float64)
    with generating(model):
        for rows_NT, counts_N in batches:
            num_rows, length = len(rows_NT), rows_NT.shape[1] - 1
            span = passes.span([0] * num_rows, [length] * num_rows)
            inputs, targets = (rows.to(passes.device) for rows in (rows_NT[:, :-1], rows_NT[:, 1:]))
            state = passes.empty_state(num_rows)
            hidden_SX = passes.trunk(inputs.flatten(), span, state)
            found = [
                judged(passes.logits(hidden), wanted, vocab_size)
                for hidden, wanted in zip(
                    hidden_SX.split(POSITIONS_AT_ONCE), targets.flatten().split(POSITIONS_AT_ONCE)
                )
            ]
            passes.finish_step()
            sums += by_copy(torch.cat(found).view(num_rows, length, 2).cpu(), counts_N)
    return sums


def judged(logits_TV: Tensor, targets_T: Tensor, vocab_size: int) -> Tensor:
    """Return (nats, 1 where the likeliest token is the right one) of each position [T,2], fp64."""
    log_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
    right_T = likeliest(logits_TV, Sampling(1, 0.0, vocab_size=vocab_size)) == targets_T
    return torch.stack([-log_T.double(), right_T.double()], 1)


def by_copy(judged_NT2: Tensor, counts_N: Tensor) -> Tensor:
    """Add up by copy, over rows that count, all but the first token of each: [2,3] as `measure_recall`."""
    num_rows, length = judged_NT2.shape[0], judged_NT2.shape[1] // 2
    copies_N2L2 = judged_NT2.view(num_rows, 2, length, 2)[:, :, 1:] * counts_N.view(-1, 1, 1, 1)
    tokens = counts_N.sum().double() * (length - 1)
    return torch.cat([copies_N2L2.sum((0, 2)), tokens.expand(2, 1)], 1)
