"""Ranges of sampling parameters: one rule for settings, requests to the server, evaluation tasks and the engine."""

from typing import Annotated

from pydantic import AfterValidator

# below, logits divided by the temperature overflow fp32, and the distribution would be NaN
MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 1e3


def temperature_complaint(value: float) -> str | None:
    """Return what is wrong with a temperature, or None."""
    # NaN is in no range
    if value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        return None
    return f"must be 0 (greedy) or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"


def top_p_complaint(value: float) -> str | None:
    """Return what is wrong with a probability mass of nucleus sampling, or None."""
    return None if 0 < value <= 1 else "must be above 0 and at most 1 (1: no restriction)"


def top_k_complaint(value: int | None) -> str | None:
    """Return what is wrong with a number of most probable tokens, or None."""
    return None if value is None or value >= 1 else "must be at least 1 (null: no restriction)"


def _check_temperature(value: float) -> float:
    if complaint := temperature_complaint(value):
        raise ValueError(complaint)
    return value


Temperature = Annotated[float, AfterValidator(_check_temperature)]
