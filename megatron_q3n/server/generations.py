"""Generations: checked requests on their way through the generation thread, on the asyncio side."""

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from megatron_q3n.config import UserError
from megatron_q3n.config.serve import ServeConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.inference.limits import GenerationLimits
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Sequence
from megatron_q3n.server.choices import Choice, Delta
from megatron_q3n.server.generation_thread import GenerationFailed, GenerationThread, NewTokens
from megatron_q3n.server.requests import BadRequest, GenerationRequest
from megatron_q3n.server.server_metrics import ServerMetrics


@dataclass(frozen=True)
class Generation:
    """A checked request: every choice's sequence and text, prompt by prompt."""

    sequences: list[Sequence]
    choices: list[Choice]
    num_prompt_tokens: int

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.num_tokens for choice in self.choices)


class Generations:
    """Maker and runner of generations: prompts are checked and tokenized here, within limits."""

    def __init__(
        self,
        thread: GenerationThread,
        tokenizer: TextTokenizer,
        limits: GenerationLimits,
        settings: ServeConfig,
        stop_tokens: frozenset[int],
        metrics: ServerMetrics,
    ) -> None:
        self._thread, self._tokenizer, self._limits = thread, tokenizer, limits
        self._settings, self._stop_tokens, self._metrics = settings, stop_tokens, metrics
        self._indices = itertools.count()
        # a text with more bytes than this has too many tokens, whatever they are
        self._max_prompt_bytes = limits.max_positions * int(tokenizer.token_num_bytes().max())

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens. Raises: BadRequest as `check_length`."""
        self.check_length(len(text))
        return self._tokenizer.encode(text)

    def check_length(self, num_characters: int) -> None:
        """Raises: BadRequest, before tokenizing, for a text that is certainly too long."""
        if num_characters > self._max_prompt_bytes:
            raise BadRequest(
                f"a prompt of {num_characters} characters has more than the model's {self._limits.max_positions} tokens"
            )

    def check_num_choices(self, num_prompts: int, request: GenerationRequest) -> None:
        """Raises: BadRequest for more completions than a request may have."""
        count, limit = num_prompts * request.num_choices, self._settings.max_choices
        if count > limit:
            raise BadRequest(
                f"{num_prompts} prompts × n={request.num_choices} are more than {limit} completions of one request "
                "(serve.max_choices)",
                parameter="n",
            )

    def max_new_tokens(self, prompt: list[int]) -> int:
        """Return the number of tokens that fit after a prompt, at least 1."""
        return max(1, self._limits.max_positions - len(prompt))

    def prepare(
        self, prompts: list[list[int]], request: GenerationRequest, max_new_tokens: int, num_top_logprobs: int
    ) -> Generation:
        """Return the generation of a request's prompts.

        Raises: BadRequest for prompts that do not fit or tokens that do not exist.
        """
        vocab_size = self._tokenizer.vocab_size
        try:
            sampling = Sampling(
                max_new_tokens,
                1.0 if request.temperature is None else request.temperature,
                request.restricts_top_k,
                1.0 if request.top_p is None else request.top_p,
                self._stop_tokens | frozenset(request.stop_token_ids or []),
                vocab_size,
                num_top_logprobs,
            )
            self._limits.check(prompts, sampling, self._thread.draft_depth)
        except UserError as error:
            raise BadRequest(str(error)) from None
        seed = secrets.token_hex(8) if request.seed is None else request.seed
        repeated = [prompt for prompt in prompts for _ in range(request.num_choices)]
        sequences = [
            Sequence(next(self._indices), prompt, f"{seed}.{i}", sampling, self._thread.draft_depth)
            for i, prompt in enumerate(repeated)
        ]
        choices = [Choice(self._tokenizer, sampling.stop_tokens, request.stops) for _ in sequences]
        return Generation(sequences, choices, sum(map(len, prompts)))

    async def run(self, generation: Generation) -> AsyncGenerator[tuple[int, Delta]]:
        """Yield each step's addition to a choice, with its number; cancel what is left when the caller leaves.

        Raises: GenerationFailed.
        """
        loop, received = asyncio.get_running_loop(), asyncio.Queue[NewTokens | None]()

        def deliver(new: NewTokens | None) -> None:
            loop.call_soon_threadsafe(received.put_nowait, new)

        numbers = {sequence.index: number for number, sequence in enumerate(generation.sequences)}
        unfinished = set(range(len(numbers)))
        self._metrics.prompt_tokens.inc(generation.num_prompt_tokens)
        if self._thread.has_failed:
            raise GenerationFailed("the generation thread has ended")
        self._thread.submit(generation.sequences, deliver)
        try:
            while unfinished:
                new = await received.get()
                if new is None:
                    raise GenerationFailed("the generation thread has ended")
                number = numbers[new.index]
                # tokens after a stop text
                if number not in unfinished:
                    continue
                delta = generation.choices[number].add(new)
                self._metrics.generated_tokens.inc(len(delta.tokens))
                if delta.finish_reason is not None:
                    unfinished.discard(number)
                    if new.finish_reason is None:
                        self._thread.cancel({generation.sequences[number]})
                yield number, delta
        finally:
            if unfinished:
                self._thread.cancel({generation.sequences[number] for number in unfinished})
