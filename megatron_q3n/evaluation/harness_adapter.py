"""lm-evaluation-harness adapter: log likelihoods of continuations, and completions, by this package's inference.

Every process runs the same harness over the same tasks. The adapter distributes the requests over data-parallel
replicas and gathers the results, so the harness itself is not aware of ranks.

Import this module only when tasks are evaluated: lm-eval is optional and slow to import.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from megatron_q3n.config import UserError
from megatron_q3n.config.sampling import temperature_complaint
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.inference.generate import generate
from megatron_q3n.inference.limits import GenerationLimits
from megatron_q3n.inference.model_runner import ModelRunner
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.model.decode.forward import generating
from megatron_q3n.model.decode.protocols import DecodeModel

# for tasks without max_gen_toks
_MAX_NEW_TOKENS = 256
_SUPPORTED = {"until", "do_sample", "temperature", "max_gen_toks", "top_k", "top_p"}
# values without effect of settings that have no support
_NEUTRAL = {"repetition_penalty": 1, "num_beams": 1, "num_return_sequences": 1, "min_p": 0}
# log probability in nats, and whether greedy decoding gives the same tokens
Score = tuple[float, bool]


class HarnessModel(TemplateLM):
    """Model of this rank behind the interface of lm-evaluation-harness; requests are split over `data_group`."""

    def __init__(
        self,
        model: DecodeModel,
        tokenizer: TextTokenizer,
        data_group: Any,
        *,
        tokens_per_pass: int,
        draft_depth: int,
        stop_tokens: frozenset[int] = frozenset(),
    ) -> None:
        """Make the adapter; `stop_tokens` end a completion in addition to the end-of-document token."""
        super().__init__()
        GenerationLimits.from_model(model).check([], Sampling(1), draft_depth)
        self._model, self._tokenizer, self._group = model, tokenizer, data_group
        self._tokens_per_pass, self._draft_depth = tokens_per_pass, draft_depth
        self._stop_tokens = stop_tokens | {tokenizer.eod}
        self._runner = ModelRunner(model, 0)
        self.max_length = model.max_sequence_length

    @property
    def eot_token_id(self) -> int:
        """Document separator, which also replaces an empty context."""
        return self._tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return the token ids of a text; the tokenizer adds no special tokens."""
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of its continuation, split as by the harness where it can.

        A continuation that is part of the context's last token has no token of its own in the harness's split; there
        the shared token belongs to the continuation, after the tokens that the context alone also has.
        """
        before, after = super()._encode_pair(context, continuation)
        if not after and continuation:
            whole = self.tok_encode(context + continuation)
            pairs = zip(whole[:-1], self.tok_encode(context))
            num_equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(whole) - 1, len(before)))
            before, after = whole[:num_equal], whole[num_equal:]
        return before or [self.prefix_token_id], after

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of whole texts; long texts are split into windows that overlap by one token."""
        windows, request_indices = [], []
        for request_index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((("", ""), context, continuation))
                request_indices.append(request_index)
        totals = [0.0] * len(requests)
        for request_index, (score, _) in zip(request_indices, self._loglikelihood_tokens(windows)):
            totals[request_index] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[Score]:
        """Return the scores of tokenized continuations given their contexts, which are truncated on the left."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"a continuation has {longest} tokens, but the model has only {self.max_length} positions; leave this "
                "task out."
            )
        sequences = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        local_indices = range(len(requests))[self._group.rank() :: self._group.size()]
        # an empty continuation is certain
        scores: dict[int, Score] = {index: (0.0, True) for index in local_indices if not counts[index]}
        batches = self._batches([index for index in local_indices if counts[index]], sequences)
        with generating(self._model), torch.no_grad():
            while self._runner.any_rank_has_work((batch := next(batches, None)) is not None):
                if batch is not None:
                    scores |= self._score(batch, sequences, counts)
                self._runner.run_dummy_passes()
        return self._gather_results(scores)

    def _batches(self, local_indices: list[int], sequences: list[list[int]]) -> Iterator[list[int]]:
        """Yield batches of request indices with at most `tokens_per_pass` tokens."""
        batch: list[int] = []
        for index in local_indices:
            size = sum(len(sequences[other]) for other in batch)
            if batch and size + len(sequences[index]) > self._tokens_per_pass:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _score(self, batch: list[int], sequences: list[list[int]], counts: list[int]) -> dict[int, Score]:
        """Run one packed batch and return the scores of the continuation tokens by request index."""
        inputs = [sequences[index][:-1] for index in batch]
        span = self._runner.span([0] * len(batch), [len(tokens) for tokens in inputs])
        flat = self._runner.token_tensor([token for tokens in inputs for token in tokens])
        hidden = self._runner.run_trunk(flat, span, self._runner.empty_state(len(batch)))
        scores: dict[int, Score] = {}
        for index, hidden_TX in zip(batch, hidden.split(span.counts)):
            targets = self._runner.token_tensor(sequences[index][len(sequences[index]) - counts[index] :])
            scores[index] = _score(self._runner.compute_logits(hidden_TX[len(hidden_TX) - counts[index] :]), targets)
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Complete prompts, each up to its first stop string; long prompts are truncated on the left."""
        groups: dict[Sampling, list[int]] = {}
        all_settings = [_normalized(request.args[1]) for request in requests]
        for index, settings in enumerate(all_settings):
            groups.setdefault(self._sampling(settings), []).append(index)
        texts: dict[int, str] = {}
        for sampling, members in groups.items():
            local_indices = members[self._group.rank() :: self._group.size()]
            prompt_capacity = self.max_length - sampling.max_new_tokens
            prompts = [self._prompt(requests[index].args[0], prompt_capacity) for index in local_indices]
            completions = generate(
                self._model,
                prompts,
                sampling,
                seed=[str(index) for index in local_indices],
                draft_depth=self._draft_depth,
                max_sequences=64,
            )
            for index, completion in zip(local_indices, completions):
                text = self._tokenizer.decode(t for t in completion.tokens if t not in sampling.stop_tokens)
                texts[index] = postprocess_generated_text(text, all_settings[index]["until"], None)
        return self._gather_results(texts)

    def _prompt(self, text: str, prompt_capacity: int) -> list[int]:
        return (self.tok_encode(text) or [self.prefix_token_id])[-prompt_capacity:]

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """Return the sampling settings for a task's normalized generation_kwargs.

        Raises: UserError if max_gen_toks leaves no position for the prompt, or for settings without support.
        """
        new_tokens = settings["max_gen_toks"]
        if new_tokens >= self.max_length:
            raise UserError(
                f"a task has max_gen_toks={new_tokens}, but the model has only {self.max_length} positions; lower "
                "max_gen_toks."
            )
        top_k = settings.get("top_k", 0)
        return Sampling(
            new_tokens,
            float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0,
            # -1 and 0 are no restriction in vLLM and transformers
            None if top_k in (-1, 0) else top_k,
            float(settings.get("top_p", 1.0)),
            self._stop_tokens,
            self._tokenizer.vocab_size,
        )

    def _gather_results(self, local_results: dict[int, Any]) -> list[Any]:
        """Return the results of all replicas in the order of the requests. A collective call."""
        gathered: list[Any] = [None] * self._group.size()
        torch.distributed.all_gather_object(gathered, local_results, group=self._group)
        results = {index: result for part in gathered for index, result in part.items()}
        return [results[index] for index in sorted(results)]


def _score(logits_SV: Tensor, targets_S: Tensor) -> Score:
    chosen = logits_SV.log_softmax(-1).gather(-1, targets_S[:, None])
    return chosen.double().sum().item(), bool((logits_SV.argmax(-1) == targets_S).all())


def _normalized(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a task's generation_kwargs by the harness's own rules: one name of the token limit, do_sample, until.

    Raises: UserError for a setting that would have no effect.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if complaint := temperature_complaint(given.get("temperature", 0)):
        raise UserError(f"a task has generation_kwargs temperature={given['temperature']!r}: it {complaint}.")
    normalized = dict(normalize_gen_kwargs(given, _MAX_NEW_TOKENS))
    for name, value in normalized.items():
        if name not in _SUPPORTED and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            raise UserError(
                f"a task has generation_kwargs {name}={value!r}, which is not supported; supported are "
                f"{', '.join(sorted(_SUPPORTED))}."
            )
    return normalized
