"""Text as its tokens come: a character may be spread over several of them."""

from megatron_q3n.data.tokenizer import TextTokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WAIT = 4  # tokens: no character has more bytes, so what is still broken then is broken


class TextPieces:
    """Decodes token by token, holding back what is not yet a whole character. Stop tokens are not shown."""

    def __init__(self, tokenizer: TextTokenizer, stop_tokens: frozenset[int]) -> None:
        self._tokenizer, self._stop_tokens = tokenizer, stop_tokens
        self._waiting: list[int] = []

    def add(self, tokens: list[int]) -> str:
        """Return the text that these tokens complete."""
        text = ""
        for token in tokens:
            if token in self._stop_tokens:
                continue
            self._waiting.append(token)
            decoded = self._tokenizer.decode(self._waiting)
            if not decoded.endswith(_UNFINISHED) or len(self._waiting) >= _LONGEST_WAIT:
                text += self.rest()
        return text

    def rest(self) -> str:
        """Return what is held back, broken characters as U+FFFD."""
        text = self._tokenizer.decode(self._waiting)
        self._waiting = []
        return text
