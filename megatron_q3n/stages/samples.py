"""Text samples of a trained model, and for Python the share of lines that tokenize."""

import io
import tokenize

from megatron_q3n.config.reporting import SampleConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.inference.generate import generate
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.model.decode.protocols import DecodeModel

# shorter lines are not informative
MIN_LINE_CHARACTERS = 20
MAX_LINES = 20


def sample_texts(
    model: DecodeModel, tokenizer: TextTokenizer, settings: SampleConfig, seed: int
) -> list[dict[str, str]]:
    """Return `settings.count` samples, cycling through the prompts."""
    prompts = [settings.prompts[i % len(settings.prompts)] for i in range(settings.count)]
    if not prompts:
        return []
    ids = [tokenizer.encode(prompt) or [tokenizer.eod] for prompt in prompts]
    sampling = Sampling(
        settings.tokens, settings.temperature, stop_tokens=frozenset({tokenizer.eod}), vocab_size=tokenizer.vocab_size
    )
    completions = generate(model, ids, sampling, seed=seed)
    return [
        {"prompt": prompt, "text": tokenizer.decode(t for t in completion.tokens if t != tokenizer.eod)}
        for prompt, completion in zip(prompts, completions)
    ]


def share_of_python_lines(samples: list[dict[str, str]]) -> tuple[int, int]:
    """Count lines that Python's tokenizer accepts, among the first 20 complete lines of 20 characters or more.

    The first and the last line of a sample are cut by prompt and length, so only the lines between them are counted.
    Returns: number of lines accepted, number of lines checked.
    """
    lines = [
        line
        for sample in samples
        for line in (sample["prompt"] + sample["text"]).split("\n")[:-1]
        if len(line) >= MIN_LINE_CHARACTERS
    ][:MAX_LINES]
    return sum(map(is_tokenizable, lines)), len(lines)


def is_tokenizable(line: str) -> bool:
    """Return whether a line is made of Python tokens: no invalid character, no unclosed string or bracket."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)
