"""Choice: one completion as it grows, from tokens to text, up to a stop token, a stop text or the token limit."""

import math
from dataclasses import dataclass

from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.inference.detokenizer import IncrementalDetokenizer
from megatron_q3n.inference.sequence import FinishReason
from megatron_q3n.inference.stop_texts import StopTexts
from megatron_q3n.server.generation_thread import GenerationFailed, NewTokens


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-prob (nats) under the model, the most probable tokens at its position, and where in the text the
    first character begins that it completes."""

    token: int
    logprob: float
    top: dict[int, float]
    text_offset: int


@dataclass(frozen=True)
class Delta:
    """What one step adds to a choice. A character or stop text that is not complete yet is held back from `text`."""

    text: str
    tokens: list[TokenLogprob]
    finish_reason: FinishReason | None


class Choice:
    """One completion as it grows."""

    def __init__(self, tokenizer: TextTokenizer, stop_tokens: frozenset[int], stops: list[str]) -> None:
        self._text = IncrementalDetokenizer(tokenizer, stop_tokens)
        self._stops = StopTexts(stops)
        self.num_tokens = self._num_characters = 0
        self.is_finished = False

    def add(self, new: NewTokens) -> Delta:
        """Add tokens, up to the one that completes a stop text.

        Raises: GenerationFailed if the model's log-probs are not numbers.
        """
        text, tokens = "", []
        finish_reason: FinishReason | None = None
        for position, token in enumerate(new.tokens):
            if not math.isfinite(new.logprobs[position]):
                raise GenerationFailed("the model's log-probs are not finite numbers; its weights are damaged.")
            top = new.top_logprobs[position] if new.top_logprobs else {}
            tokens.append(TokenLogprob(token, new.logprobs[position], top, self._num_characters))
            decoded = self._text.add([token])
            self._num_characters += len(decoded)
            text += self._stops.add(decoded)
            if self._stops.is_stopped:
                finish_reason = "stop"
                break
        if finish_reason is None and new.finish_reason is not None:
            finish_reason = new.finish_reason
            text += self._stops.add(self._text.flush()) + self._stops.flush()
        self.num_tokens += len(tokens)
        self.is_finished = finish_reason is not None
        return Delta(text, tokens, finish_reason)
