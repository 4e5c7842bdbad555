"""Our inference as lm-evaluation-harness sees a model: scores of continuations, and completions.

Every process runs the same harness over the same tasks; only the model's work is shared out here, over
replicas, and its answers are gathered. So the harness needs to know nothing of ranks.

Imported late, by who wants tasks: lm-eval is optional and slow to import.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from megatron_q3n.config import UserError
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.inference.generate import generate
from megatron_q3n.inference.passes import Passes
from megatron_q3n.inference.request import Abilities
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.model.decode.forward import generating

_MAX_NEW_TOKENS = 256  # where a task does not say
Score = tuple[float, bool]  # log probability in nats, and whether greedy decoding would say the same


class HarnessModel(TemplateLM):
    """A model on this rank, with the replica group that shares the work."""

    def __init__(
        self, model: Any, tokenizer: TextTokenizer, data_group: Any, *, tokens_per_pass: int, draft_depth: int
    ) -> None:
        super().__init__()
        Abilities.of(model).check([], Sampling(1), draft_depth)
        self._model, self._text, self._group = model, tokenizer, data_group
        self._tokens_per_pass, self._draft_depth = tokens_per_pass, draft_depth
        self._passes = Passes(model, 0)
        self.max_length = model.max_sequence_length

    @property
    def eot_token_id(self) -> int:
        """The token between documents: what an empty context becomes."""
        return self._text.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return a text's tokens; this tokenizer adds none of its own."""
        return self._text.encode(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, from the start of a document; long ones in windows that overlap by one token."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((("", ""), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[Score]:
        """Score continuations, given contexts, both as tokens. Too long ones lose the beginning of their context."""
        sequences = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        mine = range(len(requests))[self._group.rank() :: self._group.size()]
        scores: dict[int, Score] = {}
        batches = self._batches(mine, sequences)
        with generating(self._model), torch.no_grad():
            while self._passes.anyone((batch := next(batches, None)) is not None):
                if batch is not None:
                    scores |= self._score(batch, sequences, counts)
                self._passes.finish_step()
        return self._everyones(scores)

    def _batches(self, mine: range, sequences: list[list[int]]) -> Iterator[list[int]]:
        """Cut the work into passes of bounded size."""
        batch: list[int] = []
        for index in mine:
            size = sum(len(sequences[other]) for other in batch)
            if batch and size + len(sequences[index]) > self._tokens_per_pass:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _score(self, batch: list[int], sequences: list[list[int]], counts: list[int]) -> dict[int, Score]:
        """Run some sequences, packed, and read the scores of their last tokens."""
        inputs = [sequences[index][:-1] for index in batch]
        span = self._passes.span([0] * len(batch), [len(tokens) for tokens in inputs])
        flat = self._passes.tokens([token for tokens in inputs for token in tokens])
        hidden = self._passes.trunk(flat, span, self._passes.empty_state(len(batch)))
        found: dict[int, Score] = {}
        for index, hidden_TX in zip(batch, hidden.split(span.counts)):
            wanted = self._passes.tokens(sequences[index][-counts[index] :])
            found[index] = _score(self._passes.logits(hidden_TX[-counts[index] :]), wanted)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Complete prompts, each up to the first of its stop texts. Too long prompts lose their beginning."""
        groups: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(index)
        texts: dict[int, str] = {}
        for sampling, members in groups.items():
            mine = members[self._group.rank() :: self._group.size()]
            room = self.max_length - sampling.max_new_tokens
            prompts = [self._prompt(requests[index].args[0], room) for index in mine]
            done = generate(
                self._model,
                prompts,
                sampling,
                seed=[str(index) for index in mine],
                draft_depth=self._draft_depth,
                max_sequences=64,
            )
            for index, completion in zip(mine, done):
                text = self._text.decode(completion.tokens)
                texts[index] = _cut(text, requests[index].args[1].get("until", []))
        return self._everyones(texts)

    def _prompt(self, text: str, room: int) -> list[int]:
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """Translate a task's generation settings.

        Raises: UserError if the model's positions leave no room for a prompt.
        """
        new_tokens = int(settings.get("max_gen_toks", _MAX_NEW_TOKENS))
        if new_tokens >= self.max_length:
            raise UserError(
                f"a task asks for {new_tokens} new tokens, and the model has {self.max_length} positions; lower its "
                "max_gen_toks."
            )
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        return Sampling(
            new_tokens,
            temperature,
            settings.get("top_k"),
            float(settings.get("top_p", 1.0)),
            frozenset({self._text.eod}),
            self._text.vocab_size,
        )

    def _everyones(self, mine: dict[int, Any]) -> list[Any]:
        """Return every replica's answers in the order of the requests. A collective call."""
        shares: list[Any] = [None] * self._group.size()
        torch.distributed.all_gather_object(shares, mine, group=self._group)
        answers = {index: answer for share in shares for index, answer in share.items()}
        return [answers[index] for index in sorted(answers)]


def _score(logits_SV: Tensor, wanted_S: Tensor) -> Score:
    chosen = logits_SV.log_softmax(-1).gather(-1, wanted_S[:, None])
    return chosen.double().sum().item(), bool((logits_SV.argmax(-1) == wanted_S).all())


def _cut(text: str, stops: str | list[str]) -> str:
    """Return the text before the first of the stop texts."""
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text
