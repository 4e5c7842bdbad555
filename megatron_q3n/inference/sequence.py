"""Sequence being generated: prompt, completion, random numbers, and acceptance counts of its drafts."""

import random
from dataclasses import dataclass, field
from typing import Literal

from megatron_q3n.inference.sampling import Sampling

FinishReason = Literal["stop", "length"]


@dataclass
class Completion:
    """Generated tokens of one prompt.

    `tokens` ends with the stop token if one was sampled ("stop"), else at the token limit ("length"). `logprobs` are
    natural-log probabilities, fp32, under the model's own distribution, softmax(logits); `sampled_logprobs` under the
    distribution the tokens were sampled from, after temperature, top_k and top_p (0 when greedy).

    `drafted[d]` counts the verified drafts of depth d+1, that is, those before which all drafts were accepted;
    `accepted[d]` the accepted ones. Their ratio is the conditional acceptance rate at that depth.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TokenChunk:
    """New tokens of the completion of prompt `index`; the last chunk has its finish reason."""

    index: int
    tokens: list[int]
    finish_reason: FinishReason | None


class Sequence:
    """A prompt and its completion so far."""

    def __init__(self, index: int, prompt: list[int], seed: str, sampling: Sampling, draft_depth: int) -> None:
        self.index, self.prompt, self.sampling = index, prompt, sampling
        # prompt tokens in the decode state
        self.num_prefilled = 0
        # Python's generator gives the same numbers on every platform and Python version
        self._random = random.Random(seed)
        # for each token of the completion the most probable ones, if `sampling.num_top_logprobs` asks for them
        self.top_logprobs: list[dict[int, float]] = []
        self.completion = Completion(drafted=[0] * draft_depth, accepted=[0] * draft_depth)

    @property
    def last_token(self) -> int:
        """The newest token, the input of the next step."""
        return self.completion.tokens[-1]

    @property
    def is_prefilled(self) -> bool:
        """Whether the decode state contains the whole prompt."""
        return self.num_prefilled == len(self.prompt)

    @property
    def is_finished(self) -> bool:
        """Whether the completion has ended."""
        return self.completion.finish_reason is not None

    def next_prompt_tokens(self, count: int) -> list[int]:
        """Return the next prompt tokens to prefill, and advance past them."""
        self.num_prefilled += count
        return self.prompt[self.num_prefilled - count : self.num_prefilled]

    def following_tokens(self, count: int) -> list[int]:
        """Return the successor of each of the last `count` prefilled tokens; the prompt's is the first sampled one."""
        shifted = [*self.prompt[self.num_prefilled - count + 1 : self.num_prefilled + 1]]
        return shifted if len(shifted) == count else [*shifted, self.completion.tokens[0]]

    def next_random_numbers(self, count: int) -> list[float]:
        """Return the next numbers of this sequence's random stream, in [0, 1)."""
        return [self._random.random() for _ in range(count)]

    def append(self, tokens: list[int], logprobs: list[float], sampled_logprobs: list[float]) -> TokenChunk:
        """Append tokens up to the first one that ends the completion."""
        completion = self.completion
        limit = self.sampling.max_new_tokens - len(completion.tokens)
        stops = [i for i, token in enumerate(tokens) if token in self.sampling.stop_tokens]
        if stops and stops[0] < limit:
            completion.finish_reason, limit = "stop", stops[0] + 1
        elif len(tokens) >= limit:
            completion.finish_reason = "length"
        completion.tokens += tokens[:limit]
        completion.logprobs += logprobs[:limit]
        completion.sampled_logprobs += sampled_logprobs[:limit]
        return TokenChunk(self.index, tokens[:limit], completion.finish_reason)

    def record_verification(self, num_accepted: int) -> None:
        """Count the verified and accepted drafts of one step."""
        for depth in range(len(self.completion.drafted)):
            self.completion.drafted[depth] += depth <= num_accepted
            self.completion.accepted[depth] += depth < num_accepted


def acceptance(completions: list[Completion]) -> list[tuple[int, int]]:
    """Return (drafted, accepted) for each depth, over all completions."""
    if not completions:
        return []
    depths = range(len(completions[0].drafted))
    return [(sum(c.drafted[d] for c in completions), sum(c.accepted[d] for c in completions)) for d in depths]


def mean_acceptance_length(completions: list[Completion]) -> float:
    """Return tokens per decode step: one plus the mean number of accepted drafts."""
    counts = acceptance(completions)
    num_steps = counts[0][0] if counts else 0
    return 1 + sum(accepted for _, accepted in counts) / max(1, num_steps)
