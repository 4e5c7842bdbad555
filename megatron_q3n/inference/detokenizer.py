"""Incremental detokenizer: text of a token stream in which a character may span several tokens.

Tokens are bytes, and a UTF-8 decoder keeps the bytes of an unfinished character until the next ones arrive. It counts
bytes and not tokens: with a small vocabulary many tokens in a row end inside a character.
"""

import codecs

from megatron_q3n.data.tokenizer import TextTokenizer


class IncrementalDetokenizer:
    """Decodes token by token and buffers incomplete characters. Stop tokens are skipped."""

    def __init__(self, tokenizer: TextTokenizer, stop_tokens: frozenset[int]) -> None:
        self._tokenizer, self._stop_tokens = tokenizer, stop_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: list[int]) -> str:
        """Return the text that these tokens complete, with U+FFFD for invalid bytes."""
        shown = (token for token in tokens if token not in self._stop_tokens)
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, shown)))

    def flush(self) -> str:
        """Return U+FFFD if the stream ended inside a character."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
