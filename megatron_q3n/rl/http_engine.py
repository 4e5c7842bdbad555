"""HTTP rollout engine: generates with OpenAI-compatible servers (vLLM, SGLang, or our serve stage).

Prompts and responses are sent as token ids, so that no tokenizer lies between rollout and trainer; each token comes
with the log-prob it was sampled with. Only the leader connects to servers. A failed request is retried on the next
server, and a server that keeps failing is named in the error. Replies are checked (`rollout_reply.py`). A request's
responses are used all together or not at all, so no sample is lost or duplicated.

New weights are safetensors on a disk that the servers can read, loaded by SGLang's `update_weights_from_disk`, which
our server implements too. A rollout starts after every server has loaded them, so samples are stale by at most the
updates of one rollout.
"""

import itertools
import os
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
from megatron_q3n.rl.rollout_reply import BadReply, check_weights_reply, read_choices
from megatron_q3n.rl.samples import Prompt, Sample

PROMPTS_PER_REQUEST = 16
# delay before the first retry; it doubles each time (exponential backoff)
FIRST_BACKOFF_SECONDS = 0.5


class HttpEngine:
    """Rollout engine over HTTP servers; `write_weights(version)` writes the present weights to the servers' folder."""

    def __init__(
        self,
        group: Parallel,
        settings: RolloutConfig,
        stop_tokens: frozenset[int],
        vocab_size: int,
        seed: int,
        write_weights: Callable[[int], Path],
    ) -> None:
        self._group, self._settings, self._write_weights = group, settings, write_weights
        self._stop_tokens, self._vocab_size, self._seed = sorted(stop_tokens), vocab_size, seed
        self._version: int | None = None
        key = os.environ.get(settings.api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=settings.timeout_seconds, headers=headers)
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
        url, reply = self._post(number, "completions", request)
        limits = {"vocab_size": self._vocab_size, "max_new_tokens": self._settings.max_new_tokens}
        try:
            choices = read_choices(reply, len(prompts) * count, **limits)
        except BadReply as error:
            raise UserError(f"rl.rollout.urls: {url} sent a reply that cannot be used: {error}.") from None
        version = self._version
        assert version is not None, "update_weights is called before the first rollout"
        members = ((prompt, member) for prompt in prompts for member in range(count))
        return [
            Sample(prompt, member, choice.tokens, choice.logprobs, choice.finish_reason, version)
            for (prompt, member), choice in zip(members, choices)
        ]

    def _post(self, number: int, path: str, request: dict[str, Any]) -> tuple[str, Any]:
        """Send a request to one server after the other until one succeeds.

        Returns: the server's address and its reply, which is JSON of any form.

        Raises: UserError with each server's last error.
        """
        urls, errors = self._settings.urls, {}
        for attempt, backoff in zip(range(self._settings.attempts), _backoff_seconds()):
            url = urls[(number + attempt) % len(urls)]
            try:
                reply = self._client.post(f"{url.rstrip('/')}/{path}", json=request)
                reply.raise_for_status()
                return url, reply.json()
            # RecursionError: JSON of thousands of levels
            except (httpx.HTTPError, ValueError, RecursionError) as error:
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
                check_weights_reply(reply.json())
                return
            except (httpx.HTTPError, ValueError, RecursionError) as error:
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
