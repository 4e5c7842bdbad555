#!/usr/bin/env python
"""Chat with a trained model in the terminal, by its chat template; answers appear as they are generated.

tools/chat.py runs/latest
tools/chat.py http://127.0.0.1:8000/v1 --system "Answer in one word." --temperature 0
An empty line ends the chat; /new begins another one.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from megatron_q3n.config import EXIT_BAD_INPUT, UserError

API_KEY_ENV = "Q3N_API_KEY"
# the first answer may wait for kernels to compile
TIMEOUT_SECONDS = 600


def main() -> int:
    """Chat until an empty line, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="a run directory, a checkpoint in one, or the address of a server (…/v1)")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--tokens", type=int, help="maximum number of tokens per answer")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", nargs="+", default=[], metavar="setting=value", help="settings of the serve recipe")
    options = parser.parse_args()
    try:
        with _address(options.source, options.set) as url:
            _chat(url, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print()
    return 0


@contextmanager
def _address(source: str, settings: list[str]) -> Iterator[str]:
    """Yield the address of a server, started for a run directory and ended afterwards.

    Raises: UserError if the server does not start; it has printed the reason.
    """
    if source.startswith(("http://", "https://")):
        yield source.rstrip("/")
        return
    # quotes and backslashes of a path have a meaning in Hydra's grammar
    quoted = json.dumps(source, ensure_ascii=False)
    command = [sys.executable, "-m", "megatron_q3n.train", "--config-name", "serve", f"checkpoint.load={quoted}"]
    process = subprocess.Popen([*command, "serve.port=0", *settings], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if not first.startswith("serving "):
            process.wait()
            raise UserError(f"{source} cannot be served, see above.")
        yield first.split()[1]
    finally:
        process.terminate()
        process.wait()


def _chat(url: str, options: argparse.Namespace) -> None:
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(system)
    key = os.environ.get(API_KEY_ENV)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(headers=headers, timeout=TIMEOUT_SECONDS) as client:
        while text := _read_line():
            if text == "/new":
                messages = list(system)
                continue
            messages.append({"role": "user", "content": text})
            body = {"messages": messages, "temperature": options.temperature, "stream": True}
            body |= {"max_completion_tokens": options.tokens} if options.tokens else {}
            body |= {"seed": options.seed} if options.seed is not None else {}
            answer = ""
            for piece in _stream(client, f"{url}/chat/completions", body):
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _stream(client: httpx.Client, url: str, body: dict[str, object]) -> Iterator[str]:
    """Yield the pieces of an answer, its reasoning included.

    Raises: UserError with the server's message.
    """
    try:
        with client.stream("POST", url, json=body) as reply:
            if reply.status_code != 200:
                raise UserError(f"{url}: status {reply.status_code}, {reply.read().decode(errors='replace')[:300]}")
            for line in reply.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise UserError(f"{url}: {event['error']['message']}")
                delta = event["choices"][0]["delta"]
                yield delta.get("reasoning_content", "") + (delta.get("content") or "")
    except httpx.HTTPError as error:
        raise UserError(f"{url}: {type(error).__name__} {error}. Is the server running?") from None


if __name__ == "__main__":
    sys.exit(main())
