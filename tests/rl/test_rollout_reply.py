"""Replies of rollout servers that are wrong: one clear error for each, from a real HTTP server that answers wrongly.

No weights are needed: the engine only sends and reads. The fuzz changes one place of a right reply in 200 ways.
"""

import copy
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import RolloutConfig
from megatron_q3n.rl.samples import Prompt

VOCAB, MAX_TOKENS, NUM_REPLIES = 50, 4, 200
PROMPTS = [Prompt(number, [1, 2, 3], {}) for number in range(2)]
RIGHT: dict[str, Any] = {
    "choices": [
        {
            "index": index,
            "text": "ab",
            "finish_reason": "stop",
            "logprobs": {"tokens": ["token_id:7", "token_id:49"], "token_logprobs": [-0.5, 0.0]},
        }
        for index in range(4)
    ]
}
# values that no field of a reply may have
WRONG: list[Any] = [None, True, -1, 99, 10**400, 1e309, float("nan"), float("-inf"), 5.0, "", "a", "token_id:", [], {}]
WRONG += [
    "token_id:50",
    "token_id:-1",
    "token_id:" + "9" * 5000,
    [[]],
    [None],
    {"tokens": []},
    "token_id:²",
    "token_id:7",
]


class WrongServer(ThreadingHTTPServer):
    """Server that answers every request with `body`."""

    body = b"{}"


class Handler(BaseHTTPRequestHandler):
    """Handler whose method names are those of http.server."""

    server: WrongServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[WrongServer]:
    with WrongServer(("127.0.0.1", 0), Handler) as wrong:
        thread = threading.Thread(target=wrong.serve_forever)
        thread.start()
        yield wrong
        wrong.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def engine(alone: Any, server: WrongServer) -> Any:
    from megatron_q3n.rl.http_engine import HttpEngine

    url = f"http://127.0.0.1:{server.server_port}/v1"
    settings = RolloutConfig(engine="http", urls=[url], max_new_tokens=MAX_TOKENS, attempts=1)
    engine = HttpEngine(alone[1], settings, frozenset({0}), VOCAB, 1, lambda _: Path("weights"))
    engine._version = 0
    return engine


def reply(**changes: Any) -> dict[str, Any]:
    """A right reply whose first choice has these changes; those of `logprobs` are merged."""
    changed = copy.deepcopy(RIGHT)
    first = changed["choices"][0]
    first["logprobs"] |= changes.pop("logprobs", {})
    first |= changes
    return changed


def test_a_right_reply_is_used(engine: Any, server: WrongServer) -> None:
    server.body = json.dumps(RIGHT).encode()
    samples = engine.generate(PROMPTS, 2)
    assert [sample.key for sample in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (samples[0].tokens, samples[0].logprobs, samples[0].finish_reason) == ([7, 49], [-0.5, 0.0], "stop")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "the reply is not an object"),
        ({}, "choices must be a list"),
        ({"choices": RIGHT["choices"][:3]}, "3 of 4 responses"),
        ({"choices": [*RIGHT["choices"], RIGHT["choices"][0]]}, "indices of choices"),
        (reply(index=1), "indices of choices"),
        (reply(index=True), "indices of choices"),
        (reply(finish_reason=None), "finish_reason must be stop or length"),
        (reply(logprobs={"tokens": ["a", "b"]}), "tokens must be given as token_id"),
        (reply(logprobs={"tokens": ["token_id:50", "token_id:1"]}), "token ids go from 0 to 49.*token_id:50"),
        (reply(logprobs={"tokens": ["token_id:1"]}), "1 tokens with 2 log-probs"),
        (reply(logprobs={"tokens": [], "token_logprobs": []}), "0 tokens"),
        (reply(logprobs={"tokens": ["token_id:1"] * 5, "token_logprobs": [-1.0] * 5}), "more tokens than max_tokens=4"),
        (reply(logprobs={"token_logprobs": [-0.5, 5.0]}), "log-probs are finite and at most 0; found 5.0"),
        (reply(logprobs={"token_logprobs": [float("-inf"), 0]}), "log-probs are finite and at most 0; found -inf"),
        (reply(logprobs={"token_logprobs": [float("nan"), 0]}), "log-probs are finite and at most 0; found nan"),
    ],
)
def test_wrong_replies_name_the_server_and_what_it_sent(
    engine: Any, server: WrongServer, content: Any, message: str
) -> None:
    server.body = json.dumps(content).encode()
    with pytest.raises(UserError, match=rf"rl.rollout.urls: http://127.0.0.1:\d+/v1 .*{message}"):
        engine.generate(PROMPTS, 2)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'"a"', b"null"])
def test_bodies_that_are_not_replies(engine: Any, server: WrongServer, body: bytes) -> None:
    server.body = body
    with pytest.raises(UserError, match=r"rl\.rollout\.urls"):
        engine.generate(PROMPTS, 2)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value that the engine reads."""
    if path and path[-1] != "text":
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def test_random_damage_is_a_clear_error_or_does_not_change_what_is_used(engine: Any, server: WrongServer) -> None:
    generator = random.Random(5)
    paths = list(places(RIGHT))
    errors = []
    for _ in range(NUM_REPLIES):
        changed = copy.deepcopy(RIGHT)
        *parents, last = generator.choice(paths)
        holder = changed
        for key in parents:
            holder = holder[key]
        if generator.random() < 0.3:
            del holder[last]
        else:
            holder[last] = generator.choice(WRONG)
        server.body = json.dumps(changed).encode()
        try:
            samples = engine.generate(PROMPTS, 2)
        except UserError as error:
            errors.append(str(error))
        else:
            for sample in samples:
                assert 0 < len(sample.tokens) == len(sample.logprobs) <= MAX_TOKENS
                assert all(0 <= token < VOCAB for token in sample.tokens)
                assert all(-1e9 < logprob <= 0 for logprob in sample.logprobs)
    assert len(errors) > NUM_REPLIES * 0.8
    assert all(message.startswith("rl.rollout.urls: http://") for message in errors)


@pytest.mark.parametrize("content", [{"success": False}, {}, [], {"success": "yes"}, "ok"])
def test_weights_that_a_server_has_not_loaded(engine: Any, server: WrongServer, content: Any) -> None:
    server.body = json.dumps(content).encode()
    with pytest.raises(UserError, match="does not load new weights"):
        engine._load_all(Path("weights"))
