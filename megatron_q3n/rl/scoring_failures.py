"""Scoring failures of a run: each reason is reported once, and a run in which nearly all responses fail is stopped.

A failed scoring (an exception, a crash, the time limit, a correct answer that cannot be read) says nothing about the
response. A run without scores would train on nothing, so it ends while there is little to lose.
"""

from collections import Counter

from megatron_q3n.config import UserError
from megatron_q3n.rl.samples import Sample

# share of the newest responses whose scoring failed, and how many responses it takes
STOP_SHARE, MIN_RESPONSES, WINDOW_RESPONSES = 0.9, 8, 64
MAX_REASONS = 20
_EXAMPLE_CHARACTERS = 160


class ScoringFailures:
    """Reasons of the failures so far, and whether the newest responses failed. The same on every rank."""

    def __init__(self) -> None:
        self._reported: set[str] = set()
        self._newest: list[bool] = []

    def update(self, samples: list[Sample]) -> list[str]:
        """Count the failures of samples that were just scored.

        Returns: a line for each reason that is new.
        Raises: UserError if nearly all of the newest responses failed.
        """
        failed = [sample for sample in samples if not sample.is_scored]
        window = max(WINDOW_RESPONSES, len(samples))
        self._newest = (self._newest + [not sample.is_scored for sample in samples])[-window:]
        reasons = Counter(str(sample.failure) for sample in failed)
        num_failed, num_newest = sum(self._newest), len(self._newest)
        if num_newest >= MIN_RESPONSES and num_failed >= STOP_SHARE * num_newest:
            reason, count = reasons.most_common(1)[0]
            example = next(sample for sample in failed if sample.failure == reason)
            raise UserError(
                f"rl.reward: scoring failed for {num_failed} of the last {num_newest} responses, {count} times with: "
                f"{reason}. For example prompt {example.prompt.number}, response "
                f"{example.text[:_EXAMPLE_CHARACTERS]!r}. Nothing was trained on them; mend the scoring function or "
                "the prompts' scoring arguments, and resume."
            )
        return self._lines(failed, reasons)

    def _lines(self, failed: list[Sample], reasons: Counter[str]) -> list[str]:
        lines = []
        for reason, count in reasons.most_common():
            if reason in self._reported or len(self._reported) > MAX_REASONS:
                continue
            self._reported.add(reason)
            prompt = next(sample.prompt.number for sample in failed if sample.failure == reason)
            more = "; further reasons are only in samples/" if len(self._reported) > MAX_REASONS else ""
            lines.append(
                f"alert: scoring failed for {count} of the responses of a rollout (prompt {prompt} first), which have "
                f"no advantage: {reason}{more}"
            )
        return lines
