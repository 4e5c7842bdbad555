"""Decode argmax, fused, against its torch reference in fp64.

Without a GPU the kernels run in Triton's interpreter. Compiled code: tests/kernels/startup/test_hopper_compiler.py.
"""

import pytest
import torch

from megatron_q3n.kernels.decode.argmax import greedy_token, verify_greedy


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("rows", "drafts", "vocab", "limit"),
    [(1, 0, 64, None), (3, 1, 5000, 4990), (2, 3, 9000, 100), (4, 6, 97, 96), (1, 15, 4096, None)],
)
def test_verify_greedy(
    rows: int, drafts: int, vocab: int, limit: int | None, dtype: torch.dtype, triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, drafts + 1, vocab, generator=generator)
    token_index = torch.randint(0, limit or vocab, (rows, drafts + 1, 1), generator=generator)
    # a large value: in bf16 other maxima may be equal
    logits.scatter_(2, token_index, 7.0)
    if limit is not None:
        logits[..., limit:] += 9.0
    logits = logits.to(triton_device, dtype)
    best = logits[..., :limit].argmax(-1)
    drafts_ND = best[:, :-1].clone()
    # no draft rejected in row 0, the first in row 1, the second in row 2, …
    for row in range(rows):
        if 0 < row <= drafts:
            drafts_ND[row, row - 1] = (drafts_ND[row, row - 1] + 1) % (limit or vocab)
    expected = verify_greedy(logits.double(), drafts_ND, limit, fused=False)
    actual = verify_greedy(logits, drafts_ND, limit, fused=True)
    num_accepted = [drafts if row == 0 or row > drafts else row - 1 for row in range(rows)]
    assert expected.packed[:, 0].tolist() == num_accepted
    torch.testing.assert_close(actual.packed, expected.packed, rtol=1e-5, atol=1e-4)
    assert torch.equal(actual.packed[:, : drafts + 2], expected.packed[:, : drafts + 2])
    for name in ("chosen_NT", "num_new_tokens_N", "row_N"):
        actual_tensor, expected_tensor = getattr(actual, name), getattr(expected, name)
        assert actual_tensor.dtype == expected_tensor.dtype == torch.int64
        assert torch.equal(actual_tensor, expected_tensor), name


@pytest.mark.parametrize(("rows", "vocab", "limit"), [(1, 8192, None), (3, 5000, 4990), (2, 97, 1)])
def test_greedy_token(rows: int, vocab: int, limit: int | None, triton_device: str) -> None:
    """Writes into a column of the drafts, from strided logits whose vocabulary padding is larger."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, 2, vocab, generator=generator).to(triton_device)[:, 1]
    if limit is not None:
        logits[:, limit:] += 9.0
    # of equal logits the lower token id wins
    logits[0, 0] = logits[0, :limit].max()
    for fused in (False, True):
        out = torch.full((rows, 3), -1, device=triton_device)
        greedy_token(logits, out[:, 1], limit, fused)
        assert out[:, 1].tolist() == [0, *logits[1:, :limit].argmax(-1).tolist()]
        assert out[:, ::2].eq(-1).all()
    greedy_token(torch.full_like(logits, float("nan")), out[:, 1], limit, True)
    assert ((out[:, 1] >= 0) & (out[:, 1] < (limit or vocab))).all()


def test_lower_token_wins_among_equal_logits(triton_device: str) -> None:
    logits = torch.zeros(1, 3, 9000, device=triton_device)
    logits[0, 1, [7000, 4097, 4096]] = 1.0
    logits[0, 2] = -float("inf")
    logits[0, 2, 8999] = -1e30
    drafts = torch.tensor([[0, 4096]], device=triton_device)
    for fused in (False, True):
        verified = verify_greedy(logits, drafts, fused=fused)
        assert verified.chosen_NT.tolist() == [[0, 4096, 8999]]
        assert verified.packed[0, 6] == 0


def test_nan_logits_give_valid_tokens(triton_device: str) -> None:
    """The embedding of the token is read next, so its id must be in range."""
    logits = torch.full((2, 2, 100), float("nan"), device=triton_device)
    logits[1, 0, :50] = -float("inf")
    verified = verify_greedy(logits, torch.ones(2, 1, dtype=torch.long).to(triton_device), 90, True)
    assert ((verified.chosen_NT >= 0) & (verified.chosen_NT < 90)).all()
    assert ((verified.num_new_tokens_N >= 1) & (verified.num_new_tokens_N <= 2)).all()
