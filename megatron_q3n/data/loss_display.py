"""Display of a tokenized conversation that shows which of its tokens have a loss, plain and in color."""

import itertools
from collections.abc import Iterator

from rich.text import Text

from megatron_q3n.data.conversations import TokenizedConversation
from megatron_q3n.data.tokenizer import TextTokenizer

OPEN, CLOSE = "⟦", "⟧"
# a longer run of tokens with or without a loss is shown by its begin and end
_MAX_RUN_CHARACTERS, _MAX_RUNS = 600, 40


def runs_of(conversation: TokenizedConversation, tokenizer: TextTokenizer) -> Iterator[tuple[str, float]]:
    """Yield the text of each run of tokens with one loss weight, and that weight."""
    pairs = zip(conversation.tokens.tolist(), conversation.weights.tolist())
    for weight, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        yield tokenizer.decode([token for token, _ in group]), weight


def loss_display(conversation: TokenizedConversation, tokenizer: TextTokenizer) -> tuple[str, Text]:
    """Return a conversation with the tokens that have a loss in ⟦ ⟧, and the same in green; other text is dim.

    A weight other than 1 is written before the text. Long runs, and runs after the 40th, are shortened.
    """
    with_loss, tokens = int((conversation.weights > 0).sum()), len(conversation.tokens)
    shown = Text(f"a training conversation: {with_loss} of {tokens} tokens have a loss, those in {OPEN}{CLOSE}\n")
    for number, (text, weight) in enumerate(runs_of(conversation, tokenizer)):
        if number == _MAX_RUNS:
            shown.append(" …")
            break
        short = _shortened(text)
        factor = "" if weight == 1 else f"{weight:g} × "
        if weight:
            shown.append(f"{OPEN}{factor}{short}{CLOSE}", style="bold green")
        else:
            shown.append(short, style="dim")
    return shown.plain, shown


def _shortened(text: str) -> str:
    half = _MAX_RUN_CHARACTERS // 2
    return text if len(text) <= _MAX_RUN_CHARACTERS else f"{text[:half]} … {text[-half:]}"
