"""64 streaming clients at once: each text equals that of the same request alone, and none waits for the others' end."""

import asyncio
import random
import time
from typing import Any

import openai

from tests.server.tiny_server import KEY

NUM_CLIENTS, NUM_TOKENS = 64, 40


async def stream_one(client: openai.AsyncOpenAI, number: int, began: float) -> tuple[str, float, float]:
    """Stream a greedy completion. Returns: text, and seconds until its first and its last chunk."""
    generator, times, text = random.Random(number), [], ""
    prompt = [generator.randrange(1, 300) for _ in range(1 + number % 50)]
    stream = await client.completions.create(
        model="policy", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, stream=True
    )
    async for chunk in stream:
        times.append(time.monotonic() - began)
        text += chunk.choices[0].text
    return text, times[0], times[-1]


async def stream_all(url: str, *, at_once: bool) -> list[tuple[str, float, float]]:
    began = time.monotonic()
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        if at_once:
            return await asyncio.gather(*(stream_one(client, number, began) for number in range(NUM_CLIENTS)))
        return [await stream_one(client, number, began) for number in range(NUM_CLIENTS)]


def test_64_streaming_clients(server: Any) -> None:
    alone = asyncio.run(stream_all(server.url, at_once=False))
    together = asyncio.run(stream_all(server.url, at_once=True))
    assert [text for text, _, _ in together] == [text for text, _, _ in alone]
    assert len({text for text, _, _ in alone}) > NUM_CLIENTS / 2, "different prompts have different texts"
    last_first_chunk, first_end = max(first for _, first, _ in together), sorted(end for _, _, end in together)
    seconds = {"one at a time": alone[-1][2], "together": first_end[-1], "last first chunk": last_first_chunk}
    print({name: round(value, 3) for name, value in seconds.items()})
    # fair: everyone has a first token before half of the clients are finished
    assert last_first_chunk < first_end[NUM_CLIENTS // 2]
