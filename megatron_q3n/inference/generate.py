"""Sample text by running the whole prefix again for every token: simple, exact, and enough for a
report's few samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    num_tokens: int,
    *,
    temperature: float,
    seed: int,
    stop_token: int,
) -> list[list[int]]:
    """Continue each prompt by up to `num_tokens` tokens, ending at `stop_token`.

    Prompts of unequal length are padded on the right: the model is causal, so padding never reaches a token before it.
    Shapes: prompts are lists of ids; none may be empty.
    Returns: the new ids, without prompt and stop token.
    """
    assert all(prompts), "a prompt needs at least one token"
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    rows = [list(prompt) for prompt in prompts]
    done = [False] * len(rows)
    with _next_token_only(model):
        for _ in range(num_tokens):
            logits_BV = _last_logits(model, rows, device)
            for row, ids in enumerate(_sample(logits_BV, temperature, generator)):
                if not done[row]:
                    done[row] = ids == stop_token
                    rows[row].append(ids)
            if all(done):
                break
    new = [row[len(prompt) :] for row, prompt in zip(rows, prompts)]
    return [ids[:-1] if ids and ids[-1] == stop_token else ids for ids in new]


def _last_logits(model: Any, rows: list[list[int]], device: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    positions = torch.arange(longest, device=device).expand_as(tokens)
    logits_BTV = model(tokens, positions, None, runtime_gather_output=True)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    return logits_BTV[torch.arange(len(rows), device=device), last].float().cpu()


def _sample(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    probabilities = (logits_BV / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).tolist()


@contextmanager
def _next_token_only(model: Any) -> Iterator[None]:
    """Evaluate without the MTP layers, which cost a forward pass and are not asked for here."""
    trained, mtp = model.training, model.mtp_process
    model.eval()
    model.mtp_process = False
    try:
        yield
    finally:
        model.mtp_process = mtp
        model.train(trained)
