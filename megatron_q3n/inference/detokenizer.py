"""Incremental detokenizer: text of a token stream in which a character may span several tokens."""

from megatron_q3n.data.tokenizer import TextTokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# no UTF-8 character has more bytes, so bytes that are incomplete after this many tokens are invalid
_MAX_PENDING_TOKENS = 4


class IncrementalDetokenizer:
    """Decodes token by token and buffers incomplete characters. Stop tokens are skipped."""

    def __init__(self, tokenizer: TextTokenizer, stop_tokens: frozenset[int]) -> None:
        self._tokenizer, self._stop_tokens = tokenizer, stop_tokens
        self._pending: list[int] = []

    def add(self, tokens: list[int]) -> str:
        """Return the text that these tokens complete."""
        text = ""
        for token in tokens:
            if token in self._stop_tokens:
                continue
            self._pending.append(token)
            decoded = self._tokenizer.decode(self._pending)
            if not decoded.endswith(_INCOMPLETE) or len(self._pending) >= _MAX_PENDING_TOKENS:
                text += self.flush()
        return text

    def flush(self) -> str:
        """Return the buffered text, with U+FFFD for invalid bytes."""
        text = self._tokenizer.decode(self._pending)
        self._pending = []
        return text
