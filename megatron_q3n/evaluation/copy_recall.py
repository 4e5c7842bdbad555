"""Copy recall (induction) probe: loss and accuracy on the second copy of a random token sequence.

A sequence is the document separator, then L random tokens, then the same L tokens again. The tokens are sampled
independently from held-out text: unigram frequencies are those of the text, and there is no other structure. Any
improvement from the first copy to the second is therefore recall from context. Softmax attention solves this with
induction heads (Olsson et al., arXiv 2209.11895); a recurrent state has a fixed size and must fail beyond some length
(Jelassi et al., arXiv 2402.01032). The probe is zero-shot: the model is not trained on it.

The first token of each copy is excluded, because the start of the repetition is not predictable. A sequence is a
function of text, seed, length and its index, identical in every parallel layout. Sums cover the sequences of this rank,
as in `held_out_loss`.

Shapes: N sequences, L tokens of a copy, T = 2 L, V vocabulary, X hidden size.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from megatron_q3n.inference.model_runner import ModelRunner
from megatron_q3n.inference.sampling import greedy_tokens
from megatron_q3n.model.decode.forward import generating
from megatron_q3n.model.decode.protocols import DecodeModel

COPIES = ("first", "second")
SUM_FIELDS = ("nats", "right", "tokens")
# positions whose logits are held at once: 1.2 GB in fp32 with a vocabulary of 152k
POSITIONS_PER_CHUNK = 2048


def repeated_sequences(text: np.ndarray, eod: int, length: int, indices: Iterable[int], seed: int) -> Tensor:
    """Return the sequences with these indices [N, 2 L + 1]: `eod`, then twice the same `length` tokens of the text."""
    tokens = text[text != eod]
    rows = []
    for index in indices:
        offsets = np.random.default_rng([seed, length, index]).integers(len(tokens), size=length)
        rows.append(np.concatenate([[eod], tokens[offsets], tokens[offsets]]))
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def measure_recall(model: DecodeModel, batches: list[tuple[Tensor, Tensor]], vocab_size: int) -> Tensor:
    """Run batches of (tokens [N, 2 L + 1], mask [N]) and return the sums over sequences whose mask is set.

    Ranks that share experts must pass the same token_index of batches. Token ids from `vocab_size` on are padding.

    Returns: [2,3], COPIES by SUM_FIELDS, fp64, on the CPU.
    """
    runner = ModelRunner(model, 0)
    sums = torch.zeros(len(COPIES), len(SUM_FIELDS), dtype=torch.float64)
    with generating(model):
        for rows_NT, mask_N in batches:
            num_rows, length = len(rows_NT), rows_NT.shape[1] - 1
            span = runner.span([0] * num_rows, [length] * num_rows)
            inputs, targets = (rows.to(runner.device) for rows in (rows_NT[:, :-1], rows_NT[:, 1:]))
            state = runner.empty_state(num_rows)
            hidden_SX = runner.run_trunk(inputs.flatten(), span, state)
            scores = [
                score_tokens(runner.compute_logits(hidden), target, vocab_size)
                for hidden, target in zip(
                    hidden_SX.split(POSITIONS_PER_CHUNK), targets.flatten().split(POSITIONS_PER_CHUNK)
                )
            ]
            runner.run_dummy_passes()
            sums += sum_by_copy(torch.cat(scores).view(num_rows, length, 2).cpu(), mask_N)
    return sums


def score_tokens(logits_TV: Tensor, targets_T: Tensor, vocab_size: int) -> Tensor:
    """Return (loss in nats, 1 where the argmax is the target) of each position [T,2], fp64."""
    log_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
    right_T = greedy_tokens(logits_TV, vocab_size) == targets_T
    return torch.stack([-log_T.double(), right_T.double()], 1)


def sum_by_copy(scores_NT2: Tensor, mask_N: Tensor) -> Tensor:
    """Return the sums by copy over masked-in sequences, without the first token of each copy [2,3]."""
    num_rows, length = scores_NT2.shape[0], scores_NT2.shape[1] // 2
    copies_N2L2 = scores_NT2.view(num_rows, 2, length, 2)[:, :, 1:] * mask_N.view(-1, 1, 1, 1)
    tokens = mask_N.sum().double() * (length - 1)
    return torch.cat([copies_N2L2.sum((0, 2)), tokens.expand(2, 1)], 1)
