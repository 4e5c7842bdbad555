"""Scoring failures: each reason is reported once, a run without scores stops, and failures are not trained on."""

import numpy as np
import pytest

from megatron_q3n.config import UserError
from megatron_q3n.config.instruments import AlertsConfig
from megatron_q3n.metrics import names
from megatron_q3n.metrics.alerts import AlertDetector
from megatron_q3n.rl.loop_metrics import rollout_metrics
from megatron_q3n.rl.samples import NO_ANSWER, Prompt, Sample
from megatron_q3n.rl.scoring_failures import MAX_REASONS, ScoringFailures


def samples_with(reasons: list[str | None], score: float = 0.0) -> list[Sample]:
    return [
        Sample(Prompt(n // 2, [1], {}), n % 2, [1], [0.0], "stop", 0, text=f"text {n}", score=score, failure=reason)
        for n, reason in enumerate(reasons)
    ]


def test_a_reason_is_reported_once_with_its_prompt() -> None:
    failures = ScoringFailures()
    first = failures.update(samples_with([None, None, None, "KeyError: 'x'", "KeyError: 'x'", "crash", None, None]))
    assert len(first) == 2
    assert "for 2 of the responses" in first[0]
    assert "(prompt 1 first)" in first[0]
    assert "KeyError: 'x'" in first[0]
    assert failures.update(samples_with([None] * 6 + ["crash", "KeyError: 'x'"])) == []


def test_reports_end_after_some_reasons() -> None:
    failures = ScoringFailures()
    lines = failures.update(samples_with([f"error {n}" for n in range(40)] + [None] * 40))
    assert len(lines) == MAX_REASONS + 1
    assert "only in samples/" in lines[-1]


def test_a_run_without_scores_stops_with_the_reason_and_an_example() -> None:
    with pytest.raises(UserError, match=r"12 of the last 12 responses, 12 times with: TypeError: no\..*'text 0'"):
        ScoringFailures().update(samples_with(["TypeError: no"] * 12))
    small_rollouts = ScoringFailures()
    small_rollouts.update(samples_with(["crash"] * 4))
    with pytest.raises(UserError, match="8 of the last 8"):
        small_rollouts.update(samples_with(["crash"] * 4))


def test_responses_without_an_answer_do_not_stop_a_run() -> None:
    assert ScoringFailures().update(samples_with([NO_ANSWER] * 40)) == []
    assert ScoringFailures().update(samples_with(["crash"] * 8 + [None] * 2)) != []


def test_metrics_count_scored_responses_only_and_an_alert_is_raised() -> None:
    samples = samples_with([None, None, NO_ANSWER, NO_ANSWER], score=0.5) + samples_with(["crash"] * 4, score=7.0)
    for sample, number in zip(samples, range(8)):
        sample.prompt = Prompt(number // 2, [1], {})
    values = rollout_metrics(samples)
    assert values["reward/score_mean"] == 0.5
    assert values["reward/solved"] == 0
    assert values["reward/failures"] == 4
    assert values["reward/failure_share"] == 0.5
    assert values["reward/no_answer"] == 2
    assert values["reward/zero_variance_groups"] == 1
    assert all(np.isfinite(value) for value in values.values())
    for name in values:
        names.check(name)
    (alert,) = AlertDetector(AlertsConfig(), 1).update(1, values)
    assert alert.kind == "scoring failures"
