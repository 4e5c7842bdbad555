"""Protected text: a conversation's own strings, kept apart from the markup of the chat template that renders them.

Each is replaced by a private-use character while the template renders, and found again in the text: contents always,
and any other string (a thought, a name, an argument or description of a tool) that holds a special token. The template
may write a string as it is or as part of JSON.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_q3n.config import UserError

# Unicode's private-use plane 15: no template contains these characters
_FIRST_PLACEHOLDER, _NUM_PLACEHOLDERS = 0xF0000, 0xFFFD


@dataclass(frozen=True)
class TextSegment:
    """Part of a rendered conversation: one of its own strings (always ordinary text), or the template's markup."""

    text: str
    is_content: bool


@dataclass
class ProtectedTexts:
    """Strings replaced in the messages and tools of one conversation, in the order of their placeholders.

    `specials` matches the tokenizer's special tokens; None if it has none.
    """

    specials: re.Pattern[str] | None
    texts: list[str] = field(default_factory=list)

    def replace_in_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message whose content, and other strings with special tokens, are placeholders."""
        return {
            key: self._add(value)
            if key == "content" and isinstance(value, str) and value
            else value
            if key == "role"
            else self.replace(value)
            for key, value in message.items()
        }

    def replace(self, value: Any) -> Any:
        """Return a JSON value whose strings with special tokens are placeholders.

        Raises: UserError for a special token in a key, which templates look up by name.
        """
        if isinstance(value, str):
            return self._add(value) if self.specials and self.specials.search(value) else value
        if isinstance(value, list | tuple):
            return [self.replace(item) for item in value]
        if not isinstance(value, dict):
            return value
        for key in value:
            special = self.specials.search(str(key)) if self.specials else None
            if special:
                raise UserError(
                    f"the key {key!r} of a message or tool holds the special token {special[0]!r}; rename it."
                )
        return {key: self.replace(item) for key, item in value.items()}

    def segments(self, rendered: str, plain: str) -> list[TextSegment] | None:
        """Split the text that was rendered with placeholders.

        `plain` is the same text rendered without placeholders.
        Returns: None if the texts differ in more than the placeholders: the template transforms strings.
        """
        found: list[TextSegment] = []
        position = 0
        for part, index in self._parts(rendered):
            candidates = [part] if index is None else [_as_json(part), part]
            text = next((x for x in candidates if plain.startswith(x, position)), None)
            if text is None:
                return None
            position += len(text)
            found.append(TextSegment(text, index is not None))
        return found if position == len(plain) else None

    def special(self) -> str | None:
        """Return a special token that one of the strings holds, if there is any."""
        match = self.specials.search("\0".join(self.texts)) if self.specials else None
        return match[0] if match else None

    def _add(self, text: str) -> str:
        if len(self.texts) == _NUM_PLACEHOLDERS:
            raise UserError(f"a conversation of more than {_NUM_PLACEHOLDERS} contents; split it.")
        self.texts.append(text)
        return chr(_FIRST_PLACEHOLDER + len(self.texts) - 1)

    def _parts(self, rendered: str) -> Iterator[tuple[str, int | None]]:
        """Yield pieces of markup, with None, and the original strings, with their index."""
        last = chr(_FIRST_PLACEHOLDER + max(0, len(self.texts) - 1))
        for part in re.split(f"([{chr(_FIRST_PLACEHOLDER)}-{last}])", rendered):
            index = ord(part) - _FIRST_PLACEHOLDER if len(part) == 1 else -1
            if 0 <= index < len(self.texts):
                yield self.texts[index], index
            elif part:
                yield part, None


def _as_json(text: str) -> str:
    """Return the text as templates write it inside a JSON string (transformers' `tojson`)."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
