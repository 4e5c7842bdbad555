"""MTP training for drafting equals drafting: the same logits at every depth and anchor, from the same own drafts.

fp32, one process. Layouts: tests/tools/layouts/test_more_layouts.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.config.mtp import MtpConfig
from megatron_q3n.packing import Packing
from tests.inference.tiny_model import random_prompts, tiny_model

DEPTHS = 4
TOLERANCE = 1e-4
SCHEDULED = MtpConfig(method="inference", scheduled_sampling_start=1.0, scheduled_sampling_end=1.0)


@pytest.fixture(scope="module")
def model(alone: Any) -> Any:
    return tiny_model(alone, mtp_num_layers=DEPTHS, mtp_use_repeated_layer=True)


@pytest.fixture
def heads(model: Any) -> Any:
    """Collect the logits of the output layer, call by call."""
    calls: list[Tensor] = []
    hook = model.output_layer.register_forward_hook(lambda *call: calls.append(call[2][0].detach().clone()))
    yield calls
    hook.remove()


def train_forward(model: Any, settings: MtpConfig, tokens: Tensor, **packing: Any) -> Tensor:
    """Run a training pass. Returns: per-token losses."""
    from megatron_q3n.model.mtp.accumulators import MTPLosses

    model.config.pass_state.mtp = MTPLosses(DEPTHS, settings)
    model.config.mtp_detach_heads = settings.trunk != "trained"
    model.train()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    positions = packing.pop("positions", positions)
    labels = tokens.roll(-1, 1)
    mask = torch.ones(tokens.shape)
    return model(tokens, positions, None, labels=labels, loss_mask=mask, **packing)


def drafted(model: Any, tokens: list[int]) -> Tensor:
    """Draft greedily as decoding does, after all tokens but the last went through the trunk. Returns: [depths, V]."""
    from megatron_q3n.model.decode.forward import compute_logits, extend, extend_mtp, generating
    from megatron_q3n.model.decode.span import Span
    from megatron_q3n.model.decode.state import DecodeState

    state, device = DecodeState.empty(model, 1), torch.device("cpu")
    span = Span([0], [len(tokens) - 1], device)
    logits = []
    with generating(model), torch.no_grad():
        hidden = extend(model, torch.tensor(tokens[:-1]), span, state)
        hidden = extend_mtp(model, hidden, torch.tensor(tokens[1:]), span, state)[-1:]
        for depth in range(DEPTHS):
            logits.append(compute_logits(model, hidden)[0])
            span = Span([len(tokens) - 1 + depth], [1], device)
            hidden = extend_mtp(model, hidden, logits[-1].argmax(-1, keepdim=True), span, state)
    return torch.stack(logits)


def test_logits_at_every_depth_are_the_decoders(model: Any, heads: list[Tensor]) -> None:
    tokens = torch.tensor(random_prompts([40, 40], 64))
    train_forward(model, SCHEDULED, tokens)
    by_depth = torch.stack(heads[:DEPTHS])  # [depths, S, B, V]
    for row in range(2):
        for anchor in (0, 1, 7, 20, 33, 38):
            expected = drafted(model, tokens[row, : anchor + 2].tolist())
            ours = by_depth[:, anchor, row]
            torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def test_packed_documents_draft_as_single_documents(model: Any, heads: list[Tensor]) -> None:
    from megatron_q3n.model.packed_params import PackedParams

    documents = random_prompts([13, 30, 21], 64, seed=4)
    packing = Packing.of([0, 13, 43, 64])
    tokens = torch.tensor([[token for document in documents for token in document]])
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    train_forward(model, SCHEDULED, tokens, positions=positions, packed_seq_params=PackedParams.of(packing))
    by_depth = torch.stack(heads[:DEPTHS])
    for document, start in zip(documents, packing.offsets):
        for anchor in (0, 5, len(document) - 2):
            expected = drafted(model, document[: anchor + 2])
            torch.testing.assert_close(by_depth[:, start + anchor, 0], expected, rtol=0, atol=TOLERANCE)


def test_stock_training_differs_from_decoding(model: Any, heads: list[Tensor]) -> None:
    """The comparison detects a difference: stock training agrees with decoding at depth 1 and not at depth 2."""
    tokens = torch.tensor(random_prompts([40], 64))
    train_forward(model, MtpConfig(), tokens)
    expected = drafted(model, tokens[0, :35].tolist())
    # stock training feeds the text, so put the decoder's draft into the text
    torch.testing.assert_close(heads[0][33, 0], expected[0], rtol=0, atol=TOLERANCE)
    tokens[0, 35] = expected[0].argmax()
    heads.clear()
    train_forward(model, MtpConfig(), tokens)
    assert (heads[1][33, 0] - expected[1]).abs().max() > 100 * TOLERANCE
