"""Stop texts: the end of a stream of text at the first of some strings, which may span several pieces."""

from collections.abc import Sequence


class StopTexts:
    """Filter of a stream of text; what may be the beginning of a stop text is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_stopped = False

    def add(self, text: str) -> str:
        """Return the text that is certainly before a stop text; nothing after one was found."""
        if self.is_stopped:
            return ""
        text = self._held + text
        ends = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)]
        split = len(text) - longest_partial_match(text, self._stops)
        self._held = text[split:]
        return text[:split]

    def flush(self) -> str:
        """Return the text that is held back, when the stream has ended."""
        text, self._held = self._held, ""
        return text


def longest_partial_match(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest end of a text that is the beginning of a marker."""
    longest = max((len(marker) - 1 for marker in markers), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
