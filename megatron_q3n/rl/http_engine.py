"""HTTP rollout engine: generates with OpenAI-compatible servers (vLLM, SGLang, or our `completion_server.py`).

Prompts and responses are sent as token ids, so that no tokenizer lies between rollout and trainer; each token comes
with the log-prob it was sampled with. Only the leader connects to servers. A failed request is retried on the next
server, and a server that keeps failing is named in the error. A request's responses are used all together or not at
all, so no sample is lost or duplicated.

New weights are safetensors on a disk that the servers can read, loaded by SGLang's `update_weights_from_disk`, which
our server implements too. A rollout starts after every server has loaded them, so samples are stale by at most the
updates of one rollout.
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
# delay before the first retry; it doubles each time (exponential backoff)
FIRST_BACKOFF_SECONDS = 0.5
# vLLM's prefix of a token given by its id
TOKEN_ID_PREFIX = "token_id:"


class HttpEngine:
    """Rollout engine over HTTP servers; `write_weights(version)` writes the present weights to the servers' folder."""

    def __init__(
        self,
        group: Parallel,
        settings: RolloutConfig,
        stop_tokens: frozenset[int],
        seed: int,
        write_weights: Callable[[int], Path],
    ) -> None:
        self._group, self._settings, self._write_weights = group, settings, write_weights
        self._stop_tokens, self._seed = sorted(stop_tokens), seed
        self._version: int | None = None
        self._client = httpx.Client(timeout=settings.timeout_seconds)
        self.num_retries = 0

    def generate(self, prompts: list[Prompt], samples_per_prompt: int) -> list[Sample]:
        """Return every prompt's samples."""
        return self._from_leader(lambda: self._request_all(prompts, samples_per_prompt, self._settings.temperature))

    def generate_greedy(self, prompts: list[Prompt]) -> list[Sample]:
        """Return one greedy sample for each prompt."""
        return self._from_leader(lambda: self._request_all(prompts, 1, 0.0))

    def update_weights(self, version: int) -> None:
        """Write the weights and load them on every server."""
        if version == self._version:
            return
        folder = self._write_weights(version)
        self._from_leader(lambda: self._load_all(folder))
        self._version = version

    def _request_all(self, prompts: list[Prompt], count: int, temperature: float) -> list[Sample]:
        parts = list(itertools.batched(prompts, PROMPTS_PER_REQUEST))
        with ThreadPoolExecutor(len(self._settings.urls) * 4) as threads:
            results = threads.map(
                lambda part: self._request(part[0], list(part[1]), count, temperature), enumerate(parts)
            )
            return [sample for samples in results for sample in samples]

    def _request(self, number: int, prompts: list[Prompt], count: int, temperature: float) -> list[Sample]:
        """Return the samples of up to PROMPTS_PER_REQUEST prompts by one request."""
        request = {
            "model": "policy",
            "prompt": [prompt.tokens for prompt in prompts],
            "n": count,
            "max_tokens": self._settings.max_new_tokens,
            "temperature": temperature,
            "seed": _numeric_seed(f"{self._seed}.{self._version}.{prompts[0].number}"),
            "logprobs": 0,
            "stop_token_ids": self._stop_tokens,
            "return_tokens_as_token_ids": True,
        }
        request["seed"] = _numeric_seed(str(request["seed"]))
        reply = self._post(number, "completions", request)
        choices = {choice["index"]: choice for choice in reply.get("choices", [])}
        if set(choices) != set(range(len(prompts) * count)):
            raise UserError(
                f"rl.rollout.urls: {len(choices)} of {len(prompts) * count} responses were returned; the server "
                "must support `n` and lists of prompts, as OpenAI's completions do."
            )
        assert self._version is not None, "update_weights is called before the first rollout"
        return [
            _to_sample(prompt, member, choices[index * count + member], self._version)
            for index, prompt in enumerate(prompts)
            for member in range(count)
        ]

    def _post(self, number: int, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to one server after the other until one succeeds.

        Raises: UserError with each server's last error.
        """
        urls, errors = self._settings.urls, {}
        for attempt, backoff in zip(range(self._settings.attempts), _backoff_seconds()):
            url = urls[(number + attempt) % len(urls)]
            try:
                reply = self._client.post(f"{url.rstrip('/')}/{path}", json=request)
                reply.raise_for_status()
                return reply.json()
            except (httpx.HTTPError, ValueError) as error:
                errors[url] = _describe(error)
            self.num_retries += 1
            time.sleep(backoff)
        raise UserError(
            f"rl.rollout.urls: no response after {self._settings.attempts} attempts: "
            + "; ".join(f"{url}: {message}" for url, message in errors.items())
            + ". Restart the servers, or raise rl.rollout.timeout_seconds or attempts."
        )

    def _load_all(self, folder: Path) -> list[str]:
        for url in self._settings.urls:
            self._load(url, folder)
        return self._settings.urls

    def _load(self, url: str, folder: Path) -> None:
        """Load weights on one server, with retries on the same server."""
        root, message = url.rstrip("/").removesuffix("/v1"), ""
        for _, backoff in zip(range(self._settings.attempts), _backoff_seconds()):
            try:
                reply = self._client.post(f"{root}/update_weights_from_disk", json={"model_path": str(folder)})
                reply.raise_for_status()
                return
            except httpx.HTTPError as error:
                message = _describe(error)
            self.num_retries += 1
            time.sleep(backoff)
        raise UserError(
            f"rl.rollout.urls: {url} does not load new weights from {folder}: {message}. It must be able to "
            "read that folder and support POST /update_weights_from_disk, as SGLang and our serve stage do."
        )

    def _from_leader(self, request: Callable[[], list[Any]]) -> list[Any]:
        """Run a request on the leader and broadcast its result; a UserError is raised on every rank."""
        result: Any = None
        if self._group.is_leader:
            try:
                result = request()
            except UserError as error:
                result = error
        holder = [result]
        torch.distributed.broadcast_object_list(holder, src=0)
        if isinstance(holder[0], UserError):
            raise holder[0]
        return holder[0]


def _to_sample(prompt: Prompt, member: int, choice: dict[str, Any], version: int) -> Sample:
    returned = choice.get("logprobs") or {}
    names, logprobs = returned.get("tokens", []), returned.get("token_logprobs", [])
    if not names or len(names) != len(logprobs) or not names[0].startswith(TOKEN_ID_PREFIX):
        raise UserError(
            "rl.rollout.urls: a response has no token ids and log-probs; the server must support "
            "`logprobs` and `return_tokens_as_token_ids`, as vLLM's completions do."
        )
    tokens = [int(name.removeprefix(TOKEN_ID_PREFIX)) for name in names]
    return Sample(prompt, member, tokens, logprobs, choice["finish_reason"], version)


def _numeric_seed(seed: str) -> int:
    """Return a seed in the range that servers accept, 0 to 2³¹ - 2."""
    value = 0
    for byte in seed.encode():
        value = (value * 257 + byte) % (2**31 - 1)
    return value


def _backoff_seconds() -> Iterator[float]:
    return (FIRST_BACKOFF_SECONDS * 2**attempt for attempt in itertools.count())


def _describe(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}, {error.response.text[:200]}"
    return f"{type(error).__name__} {error}".strip()
