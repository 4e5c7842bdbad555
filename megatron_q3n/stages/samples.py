"""Text from the trained model, for people to read, and for Python a first check: do its lines even tokenize?"""

import io
import tokenize
from typing import Any

from megatron_q3n.config.run import SampleConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.inference.generate import generate
from megatron_q3n.inference.sampling import Sampling

LINE_LENGTH = 20  # shorter lines say little
LINES = 20


def sample_texts(model: Any, tokenizer: TextTokenizer, settings: SampleConfig, seed: int) -> list[dict[str, str]]:
    """Return `settings.count` samples, the prompts taken in turn."""
    prompts = [settings.prompts[i % len(settings.prompts)] for i in range(settings.count)]
    if not prompts:
        return []
    ids = [tokenizer.encode(prompt) or [tokenizer.eod] for prompt in prompts]
    sampling = Sampling(
        settings.tokens, settings.temperature, stop_tokens=frozenset({tokenizer.eod}), vocab_size=tokenizer.vocab_size
    )
    completions = generate(model, ids, sampling, seed=seed)
    return [
        {"prompt": prompt, "text": tokenizer.decode(t for t in done.tokens if t != tokenizer.eod)}
        for prompt, done in zip(prompts, completions)
    ]


def share_of_python_lines(samples: list[dict[str, str]]) -> tuple[int, int]:
    """Count lines that Python's tokenizer accepts, among the first 20 complete lines of 20 characters or more.

    The first and the last line of a sample are cut by prompt and length, so only the lines between count.
    Returns: accepted, looked at.
    """
    lines = [
        line
        for sample in samples
        for line in (sample["prompt"] + sample["text"]).split("\n")[:-1]
        if len(line) >= LINE_LENGTH
    ][:LINES]
    return sum(map(tokenizes, lines)), len(lines)


def tokenizes(line: str) -> bool:
    """Say whether a line is made of Python tokens: no stray character, no unclosed string or bracket."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)
