"""Scoring functions: mathematics read by the same rules in the correct answer and in the response."""

import pytest

from megatron_q3n.rl.scoring_functions import UnreadableAnswer, score_mathematics


@pytest.mark.parametrize(
    ("correct", "answer", "score"),
    [
        (r"\sqrt{2}", r"\sqrt{2}", 1),
        ("x^2+1", "x^2+1", 1),
        ("x^2+1", "1+x^2", 1),
        (r"\pi", r"\pi", 1),
        (r"\frac{1}{2}", "0.5", 1),
        (r"\frac{1}{2}", r"$\frac{2}{4}$", 1),
        ("1,000", "1000", 1),
        ("(1,2)", "(1,2)", 1),
        ("7", " 7 ", 1),
        (r"\$32", "32", 1),
        ("32", r"\$32", 1),
        (r"\$32", r"\$33", 0),
        ("1", r"1-\sqrt{2}", 0),
        ("2", r"2\pi", 0),
        ("1", "x^2+1", 0),
        ("2", r"\sqrt{2}", 0),
        ("10", "10^{100}", 0),
        ("3", "1,2,3", 0),
        (r"\pi", "3", 0),
        ("7", "", 0),
        ("7", "seven of them", 0),
    ],
)
def test_extracted_answers_are_read_as_expressions(correct: str, answer: str, score: float) -> None:
    assert score_mathematics(answer, {"answer": correct}, is_extracted=True) == score


@pytest.mark.parametrize(
    ("correct", "text", "score"),
    [
        (r"\sqrt{2}", r"So the length is $\sqrt{2}$.", 1),
        ("1", r"It is \boxed{1-\sqrt{2}}", 0),
        ("2", r"It is \boxed{2\pi}", 0),
        (r"\pi", r"It is \boxed{\pi}", 1),
        ("42", "The answer is 42.", 1),
        ("42", "The answer is 43.", 0),
        ("x^2+1", "x^2+1", 1),
        ("1", "x^2+1", 0),
        ("2", r"2\pi", 0),
        (r"\sqrt{2}", r"\sqrt{2}", 1),
        ("42", " 42\n", 1),
    ],
)
def test_whole_texts_are_searched_for_the_expression(correct: str, text: str, score: float) -> None:
    assert score_mathematics(text, {"answer": correct}, is_extracted=False) == score


@pytest.mark.parametrize("correct", ["@@", r"\frac{", "", " "])
def test_a_correct_answer_that_cannot_be_read_is_no_wrong_response(correct: str) -> None:
    for is_extracted in (True, False):
        with pytest.raises(UnreadableAnswer, match="cannot be read as mathematics"):
            score_mathematics("1", {"answer": correct}, is_extracted=is_extracted)


def test_a_number_is_a_correct_answer() -> None:
    assert score_mathematics("0.5", {"answer": 0.5}, is_extracted=True) == 1
