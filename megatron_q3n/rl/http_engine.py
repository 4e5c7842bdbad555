"""Rollouts by OpenAI-compatible servers: vLLM, SGLang, or our own (`completion_server.py`).

Prompts and answers travel as token ids, so that no tokenizer stands between rollout and trainer; with each
token comes the log probability it was drawn with. Only the leader talks to servers. A request that fails is
sent again, to the next server; a server that keeps failing is named. A request's answers are taken once,
whole, or not at all, so no sample is lost or doubled.

New weights go by way of safetensors on a disk that the servers see: SGLang's `update_weights_from_disk`,
which our server knows too. Rollouts wait until every server has them, so samples are never stale by more than
the updates of one rollout.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import RolloutConfig
from megatron_q3n.parallel import Parallel
from megatron_q3n.rl.samples import Prompt, Sample

PROMPTS_PER_REQUEST = 16
FIRST_PAUSE_SECONDS = 0.5  # before a request is sent again; twice as long each time
TOKEN_NAME = "token_id:"  # vLLM's spelling of a token by its id


class HttpEngine:
    """Asks servers for answers. `publish(version)` writes the present weights where servers find them."""

    def __init__(
        self,
        group: Parallel,
        settings: RolloutConfig,
        stop_tokens: frozenset[int],
        seed: int,
        publish: Callable[[int], Path],
    ) -> None:
        self._group, self._settings, self._publish = group, settings, publish
        self._stop_tokens, self._seed = sorted(stop_tokens), seed
        self._version: int | None = None
        self._client = httpx.Client(timeout=settings.timeout_seconds)
        self.num_retries = 0

    def answer(self, prompts: list[Prompt], samples_per_prompt: int) -> list[Sample]:
        """Return every prompt's samples."""
        return self._from_leader(lambda: self._ask_all(prompts, samples_per_prompt, self._settings.temperature))

    def answer_greedily(self, prompts: list[Prompt]) -> list[Sample]:
        """Return the likeliest answer to each prompt."""
        return self._from_leader(lambda: self._ask_all(prompts, 1, 0.0))

    def new_weights(self, version: int) -> None:
        """Publish the weights and wait until every server has them."""
        if version == self._version:
            return
        folder = self._publish(version)
        self._from_leader(lambda: self._load_all(folder))
        self._version = version

    def _ask_all(self, prompts: list[Prompt], count: int, temperature: float) -> list[Sample]:
        parts = list(itertools.batched(prompts, PROMPTS_PER_REQUEST))
        with ThreadPoolExecutor(len(self._settings.urls) * 4) as threads:
            found = threads.map(lambda part: self._ask(part[0], list(part[1]), count, temperature), enumerate(parts))
            return [sample for samples in found for sample in samples]

    def _ask(self, number: int, prompts: list[Prompt], count: int, temperature: float) -> list[Sample]:
        """Answer some prompts by one request."""
        request = {
            "model": "policy",
            "prompt": [prompt.tokens for prompt in prompts],
            "n": count,
            "max_tokens": self._settings.max_new_tokens,
            "temperature": temperature,
            "seed": _as_number(f"{self._seed}.{self._version}.{prompts[0].number}"),
            "logprobs": 0,
            "stop_token_ids": self._stop_tokens,
            "return_tokens_as_token_ids": True,
        }
        request["seed"] = _as_number(str(request["seed"]))
        reply = self._post(number, "completions", request)
        choices = {choice["index"]: choice for choice in reply.get("choices", [])}
        if set(choices) != set(range(len(prompts) * count)):
            raise UserError(
                f"rl.rollout.urls: {len(choices)} of {len(prompts) * count} answers came back; the server must know "
                "`n` and lists of prompts, as OpenAI's completions do."
            )
        assert self._version is not None, "new_weights comes before the first rollout"
        return [
            _sample(prompt, member, choices[place * count + member], self._version)
            for place, prompt in enumerate(prompts)
            for member in range(count)
        ]

    def _post(self, number: int, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to one server after the other until one answers.

        Raises: UserError naming the servers and their last words.
        """
        urls, words = self._settings.urls, {}
        for attempt, pause in zip(range(self._settings.attempts), _pauses()):
            url = urls[(number + attempt) % len(urls)]
            try:
                reply = self._client.post(f"{url.rstrip('/')}/{path}", json=request)
                reply.raise_for_status()
                return reply.json()
            except (httpx.HTTPError, ValueError) as error:
                words[url] = _words_of(error)
            self.num_retries += 1
            time.sleep(pause)
        raise UserError(
            f"rl.rollout.urls: no answer after {self._settings.attempts} attempts: "
            + "; ".join(f"{url}: {word}" for url, word in words.items())
            + ". Start the servers again, or raise rl.rollout.timeout_seconds or attempts."
        )

    def _load_all(self, folder: Path) -> list[str]:
        for url in self._settings.urls:
            self._load(url, folder)
        return self._settings.urls

    def _load(self, url: str, folder: Path) -> None:
        """Let a server load weights; it alone can, so no other is asked."""
        root, word = url.rstrip("/").removesuffix("/v1"), ""
        for _, pause in zip(range(self._settings.attempts), _pauses()):
            try:
                reply = self._client.post(f"{root}/update_weights_from_disk", json={"model_path": str(folder)})
                reply.raise_for_status()
                return
            except httpx.HTTPError as error:
                word = _words_of(error)
            self.num_retries += 1
            time.sleep(pause)
        raise UserError(
            f"rl.rollout.urls: {url} does not load new weights from {folder}: {word}. It must see that folder and "
            "know POST /update_weights_from_disk, as SGLang and our serve stage do."
        )

    def _from_leader(self, ask: Callable[[], list[Any]]) -> list[Any]:
        """Ask on the leader and share what came; a failure is everybody's."""
        result: Any = None
        if self._group.is_leader:
            try:
                result = ask()
            except UserError as error:
                result = error
        holder = [result]
        torch.distributed.broadcast_object_list(holder, src=0)
        if isinstance(holder[0], UserError):
            raise holder[0]
        return holder[0]


def _sample(prompt: Prompt, member: int, choice: dict[str, Any], version: int) -> Sample:
    told = choice.get("logprobs") or {}
    names, logprobs = told.get("tokens", []), told.get("token_logprobs", [])
    if not names or len(names) != len(logprobs) or not names[0].startswith(TOKEN_NAME):
        raise UserError(
            "rl.rollout.urls: an answer came without its tokens' ids and log probabilities; the server must know "
            "`logprobs` and `return_tokens_as_token_ids`, as vLLM's completions do."
        )
    tokens = [int(name.removeprefix(TOKEN_NAME)) for name in names]
    return Sample(prompt, member, tokens, logprobs, choice["finish_reason"], version)


def _as_number(seed: str) -> int:
    """Return a seed in the range that servers take."""
    value = 0
    for byte in seed.encode():
        value = (value * 257 + byte) % (2**31 - 1)
    return value


def _pauses() -> Iterator[float]:
    return (FIRST_PAUSE_SECONDS * 2**attempt for attempt in itertools.count())


def _words_of(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}, {error.response.text[:200]}"
    return f"{type(error).__name__} {error}".strip()
