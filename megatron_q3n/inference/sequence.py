"""One sequence being generated: its tokens, its own random numbers, and how its drafts fared."""

import random
from dataclasses import dataclass, field
from typing import Literal

from megatron_q3n.inference.sampling import Sampling

FinishReason = Literal["stop", "length"]


@dataclass
class Completion:
    """What was generated after one prompt.

    `tokens` ends with the stop token if one was drawn ("stop"), else with the last that was allowed
    ("length"). `logprobs` are under the model's own distribution, softmax(logits), of every token;
    `sampled_logprobs` under the one it was drawn from, after temperature, top_k and top_p (0 when
    greedy). Both are natural logarithms, fp32.

    `drafted[d]` counts drafts at depth d+1 that were judged, which happens when all before were
    kept; `accepted[d]` those kept. Their ratio is the conditional acceptance at that depth.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """New tokens of the completion of prompt `index`; its finish reason comes with the last ones."""

    index: int
    tokens: list[int]
    finish_reason: FinishReason | None


class Sequence:
    """A prompt, and its completion so far."""

    def __init__(self, index: int, prompt: list[int], stream: str, sampling: Sampling, draft_depth: int) -> None:
        self.index, self.prompt, self.sampling = index, prompt, sampling
        self.num_read = 0  # tokens of the prompt that the state holds
        # Python's generator: the same numbers on every platform and Python version
        self._random = random.Random(stream)
        self.completion = Completion(drafted=[0] * draft_depth, accepted=[0] * draft_depth)

    @property
    def last_token(self) -> int:
        """The token that the model sees next."""
        return self.completion.tokens[-1]

    @property
    def is_read(self) -> bool:
        """Whether the state holds the whole prompt."""
        return self.num_read == len(self.prompt)

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self.completion.finish_reason is not None

    def read(self, count: int) -> list[int]:
        """Return the next tokens of the prompt, and count them as read."""
        self.num_read += count
        return self.prompt[self.num_read - count : self.num_read]

    def following(self, count: int) -> list[int]:
        """Return the token after each of the last `count` read; after the prompt comes the first one drawn."""
        whole = [*self.prompt[self.num_read - count + 1 : self.num_read + 1]]
        return whole if len(whole) == count else [*whole, self.completion.tokens[0]]

    def uniforms(self, count: int) -> list[float]:
        """Return the next numbers of this sequence's own stream, in [0, 1)."""
        return [self._random.random() for _ in range(count)]

    def take(self, tokens: list[int], logprobs: list[float], sampled_logprobs: list[float]) -> Piece:
        """Append tokens up to the first that ends the completion."""
        done = self.completion
        limit = self.sampling.max_new_tokens - len(done.tokens)
        stops = [i for i, token in enumerate(tokens) if token in self.sampling.stop_tokens]
        if stops and stops[0] < limit:
            done.finish_reason, limit = "stop", stops[0] + 1
        elif len(tokens) >= limit:
            done.finish_reason = "length"
        done.tokens += tokens[:limit]
        done.logprobs += logprobs[:limit]
        done.sampled_logprobs += sampled_logprobs[:limit]
        return Piece(self.index, tokens[:limit], done.finish_reason)

    def count_drafts(self, num_kept: int) -> None:
        """Note a verification that kept so many drafts."""
        for depth in range(len(self.completion.drafted)):
            self.completion.drafted[depth] += depth <= num_kept
            self.completion.accepted[depth] += depth < num_kept


def acceptance(completions: list[Completion]) -> list[tuple[int, int]]:
    """Return (drafted, accepted) for each depth, over all completions."""
    if not completions:
        return []
    depths = range(len(completions[0].drafted))
    return [(sum(c.drafted[d] for c in completions), sum(c.accepted[d] for c in completions)) for d in depths]


def mean_accepted_length(completions: list[Completion]) -> float:
    """Return tokens per verification: one, and the drafts kept."""
    counts = acceptance(completions)
    rounds = counts[0][0] if counts else 0
    return 1 + sum(accepted for _, accepted in counts) / max(1, rounds)
