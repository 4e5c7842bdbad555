"""Replies of rollout servers, checked before the trainer uses them.

A server is another program on another machine: a reply of the wrong form, with ids beyond the vocabulary, more tokens
than requested, or numbers that are no log-probs is one error that names the server and what it sent. It is not
retried, since the next reply would be the same.
"""

from typing import Any

from megatron_q3n.config import UserError

# vLLM's prefix of a token given by its id
TOKEN_ID_PREFIX = "token_id:"
# log-probs are sums in fp32, so a certain token may have a little more than 0
MAX_LOGPROB, MIN_LOGPROB = 1e-4, -3e38
FINISH_REASONS = ("stop", "length")


class BadReply(UserError):
    """A reply of a rollout server that cannot be used."""


class RolloutChoice:
    """One response of a server: tokens with their log-probs, and why it ended."""

    def __init__(self, choice: Any, *, vocab_size: int, max_new_tokens: int) -> None:
        """Raises: BadReply."""
        _expect(isinstance(choice, dict), "a choice is not an object", choice)
        returned = choice.get("logprobs")
        _expect(
            isinstance(returned, dict),
            "a choice has no logprobs; the server must support `logprobs` and `return_tokens_as_token_ids`, as vLLM's "
            "completions do",
            choice,
        )
        self.tokens = [_token(name, vocab_size) for name in _list(returned, "tokens")]
        self.logprobs = [_logprob(value) for value in _list(returned, "token_logprobs")]
        counts = f"{len(self.tokens)} tokens with {len(self.logprobs)} log-probs"
        _expect(len(self.tokens) == len(self.logprobs) > 0, "a choice must have a log-prob for each token", counts)
        _expect(len(self.tokens) <= max_new_tokens, f"more tokens than max_tokens={max_new_tokens}", len(self.tokens))
        self.finish_reason: str = choice.get("finish_reason")
        _expect(self.finish_reason in FINISH_REASONS, "finish_reason must be stop or length", self.finish_reason)


def read_choices(reply: Any, count: int, *, vocab_size: int, max_new_tokens: int) -> list[RolloutChoice]:
    """Return the `count` choices of a reply by their index.

    Raises: BadReply.
    """
    _expect(isinstance(reply, dict), "the reply is not an object", reply)
    choices = _list(reply, "choices")
    by_index: dict[int, Any] = {}
    for choice in choices:
        index = choice.get("index") if isinstance(choice, dict) else None
        is_index = type(index) is int and 0 <= index < count and index not in by_index
        _expect(is_index, f"the indices of choices must be 0 to {count - 1}, each once", index)
        assert isinstance(index, int)
        by_index[index] = choice
    _expect(
        len(by_index) == count,
        f"{len(by_index)} of {count} responses were returned; the server must support `n` and lists of prompts, as "
        "OpenAI's completions do",
        sorted(by_index),
    )
    return [RolloutChoice(by_index[i], vocab_size=vocab_size, max_new_tokens=max_new_tokens) for i in range(count)]


def check_weights_reply(reply: Any) -> None:
    """Check that a server has loaded new weights.

    Raises: BadReply unless it says so.
    """
    _expect(isinstance(reply, dict), "the reply is not an object", reply)
    _expect(reply.get("success") is True, "new weights were not loaded", reply)


def _token(name: Any, vocab_size: int) -> int:
    digits = name.removeprefix(TOKEN_ID_PREFIX) if isinstance(name, str) else ""
    is_id = isinstance(name, str) and name.startswith(TOKEN_ID_PREFIX) and digits.isascii() and digits.isdigit()
    _expect(is_id, f"tokens must be given as {TOKEN_ID_PREFIX}… (`return_tokens_as_token_ids`)", name)
    # no vocabulary has ids of more digits, and Python refuses to convert very long ones
    is_in_vocabulary = len(digits) < 10 and int(digits) < vocab_size
    _expect(is_in_vocabulary, f"token ids go from 0 to {vocab_size - 1}", name)
    return int(digits)


def _logprob(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN is in no range
    _expect(is_number and MIN_LOGPROB <= value <= MAX_LOGPROB, "log-probs are finite and at most 0", value)
    return min(float(value), 0.0)


def _list(holder: dict[str, Any], name: str) -> list[Any]:
    value = holder.get(name)
    _expect(isinstance(value, list), f"{name} must be a list", value)
    assert isinstance(value, list)
    return value


def _expect(is_right: bool, problem: str, found: Any) -> None:
    if not is_right:
        raise BadReply(f"{problem}; found {repr(found)[:200]}")
