"""Greedy decoding's reading of the logits, fused, against its torch reference in fp64.

Without a GPU the kernels run in Triton's interpreter. What the compiler makes of them: tests/kernels/startup/test_hopper_compiler.py.
"""

import pytest
import torch

from megatron_q3n.kernels.decode.argmax import judge_likeliest, take_likeliest


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("rows", "drafts", "vocab", "limit"),
    [(1, 0, 64, None), (3, 1, 5000, 4990), (2, 3, 9000, 100), (4, 6, 97, 96), (1, 15, 4096, None)],
)
def test_judge_likeliest(
    rows: int, drafts: int, vocab: int, limit: int | None, dtype: torch.dtype, triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, drafts + 1, vocab, generator=generator)
    place = torch.randint(0, limit or vocab, (rows, drafts + 1, 1), generator=generator)
    logits.scatter_(2, place, 7.0)  # in bf16 others may be equal
    if limit is not None:
        logits[..., limit:] += 9.0
    logits = logits.to(triton_device, dtype)
    best = logits[..., :limit].argmax(-1)
    proposed = best[:, :-1].clone()
    for row in range(rows):  # none refused, the first, the second, …
        if 0 < row <= drafts:
            proposed[row, row - 1] = (proposed[row, row - 1] + 1) % (limit or vocab)
    wanted = judge_likeliest(logits.double(), proposed, limit, fused=False)
    got = judge_likeliest(logits, proposed, limit, fused=True)
    kept = [drafts if row == 0 or row > drafts else row - 1 for row in range(rows)]
    assert wanted.packed[:, 0].tolist() == kept
    torch.testing.assert_close(got.packed, wanted.packed, rtol=1e-5, atol=1e-4)
    assert torch.equal(got.packed[:, : drafts + 2], wanted.packed[:, : drafts + 2])
    for name in ("chosen_NT", "grown_N", "row_N"):
        ours, theirs = getattr(got, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype == torch.int64
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("rows", "vocab", "limit"), [(1, 8192, None), (3, 5000, 4990), (2, 97, 1)])
def test_take_likeliest(rows: int, vocab: int, limit: int | None, triton_device: str) -> None:
    """Into a column, as drafts are kept; of a part of the logits' rows, the padding of the vocabulary being larger."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, 2, vocab, generator=generator).to(triton_device)[:, 1]
    if limit is not None:
        logits[:, limit:] += 9.0
    logits[0, 0] = logits[0, :limit].max()  # and the lower of equal ones
    for fused in (False, True):
        out = torch.full((rows, 3), -1, device=triton_device)
        take_likeliest(logits, out[:, 1], limit, fused)
        assert out[:, 1].tolist() == [0, *logits[1:, :limit].argmax(-1).tolist()]
        assert out[:, ::2].eq(-1).all()
    take_likeliest(torch.full_like(logits, float("nan")), out[:, 1], limit, True)
    assert ((out[:, 1] >= 0) & (out[:, 1] < (limit or vocab))).all()


def test_of_equal_logits_the_lower_token_wins(triton_device: str) -> None:
    logits = torch.zeros(1, 3, 9000, device=triton_device)
    logits[0, 1, [7000, 4097, 4096]] = 1.0
    logits[0, 2] = -float("inf")
    logits[0, 2, 8999] = -1e30
    drafts = torch.tensor([[0, 4096]], device=triton_device)
    for fused in (False, True):
        judged = judge_likeliest(logits, drafts, fused=fused)
        assert judged.chosen_NT.tolist() == [[0, 4096, 8999]]
        assert judged.packed[0, 6] == 0


def test_not_a_number_still_names_tokens(triton_device: str) -> None:
    """The embedding of what is named is read next."""
    logits = torch.full((2, 2, 100), float("nan"), device=triton_device)
    logits[1, 0, :50] = -float("inf")
    judged = judge_likeliest(logits, torch.ones(2, 1, dtype=torch.long).to(triton_device), 90, True)
    assert ((judged.chosen_NT >= 0) & (judged.chosen_NT < 90)).all()
    assert ((judged.grown_N >= 1) & (judged.grown_N <= 2)).all()
