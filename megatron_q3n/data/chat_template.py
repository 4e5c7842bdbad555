"""Chat templates: which one applies, and conversations spelled in it, message contents kept apart from markup.

Contents never become control tokens: each is replaced by a private character while the template runs,
and put back afterwards, marked as content. So a user who writes "<|im_end|>" writes just these letters,
and the tokenizer's special tokens come from the template alone.

What the assistant has to say is what the template adds for a turn behind the generation prompt, up to
and with the token that ends it. Spelled so, training and generation cut the tokens at the same place.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_q3n.config import UserError
from megatron_q3n.data.tokenizer import TextTokenizer, tokenizer_file

TEMPLATE_FILE = "chat_template.jinja"
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# for tokenizers whose only special token is the end of a document, as those trained here
PLAIN = """\
{%- for message in messages %}
{{- message.role + ':\\n' + message.content + eod_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:\\n' }}{%- endif %}"""
_FIRST_MARK, _NUM_MARKS = 0xF0000, 0xFFFD  # a private-use plane: no text of the template has these


@dataclass(frozen=True)
class Piece:
    """Part of a spelled conversation. `content`: ordinary text whatever it says; else the template's own."""

    text: str
    is_content: bool


class ChatTemplate:
    """A template and the tokenizer whose tokens it names."""

    def __init__(self, source: str, tokenizer: TextTokenizer) -> None:
        self.source, self._tokenizer = source, tokenizer
        self._special_ids = tokenizer.special_ids
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def spell(self, messages: list[dict[str, Any]], *, generation_prompt: bool = False, **extras: Any) -> list[Piece]:
        """Return a conversation as the template spells it, with the opening of an assistant's turn if asked for.

        Raises: UserError if the template refuses the messages, or reads contents and these spell special tokens.
        """
        contents: list[str] = []
        marked = [_mark(message, contents) for message in messages]
        extras["add_generation_prompt"] = generation_prompt
        pieces = _pieces(self._render(marked, extras), contents)
        plain = self._render(messages, extras)
        if "".join(piece.text for piece in pieces) == plain:
            return pieces
        # a template that looks into contents, to strip them or to find a part of them, cannot be given marks
        special = self._specials.search("\0".join(contents)) if self._special_ids else None
        if special:
            raise UserError(
                f"a message spells the special token {special[0]!r}, and this chat template looks into contents, so "
                "that they cannot be kept apart; take the token out of the message."
            )
        return [Piece(plain, False)]

    def _render(self, messages: list[dict[str, Any]], extras: dict[str, Any]) -> str:
        names = {"eod_token": self._tokenizer.eod_token, "eos_token": self._tokenizer.eod_token, "bos_token": ""}
        try:
            (text,), _ = render_jinja_template([messages], chat_template=self.source, **names, **extras)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template refuses a conversation: {error}") from None
        return text

    def encode(self, pieces: list[Piece]) -> list[int]:
        """Return token ids: special tokens where the template names them, ordinary ones everywhere else."""
        ids: list[int] = []
        ordinary = ""
        for piece in pieces:
            parts = [piece.text] if piece.is_content else self._split_special(piece.text)
            for part in parts:
                special = None if piece.is_content else self._special_ids.get(part)
                if special is None:
                    ordinary += part
                    continue
                ids += [*self._tokenizer.encode(ordinary), special]
                ordinary = ""
        return ids + self._tokenizer.encode(ordinary)

    def prompt(self, messages: list[dict[str, Any]], **extras: Any) -> list[int]:
        """Return the token ids after which the assistant speaks."""
        return self.encode(self.spell(messages, generation_prompt=True, **extras))

    def _split_special(self, text: str) -> list[str]:
        """Split markup at the tokenizer's special tokens, which are kept."""
        return [part for part in self._specials.split(text) if part]

    def behind_last_special(self, text: str) -> int:
        """Return where the text behind the last special token begins; its end if there is none."""
        ends = [found.end() for found in self._specials.finditer(text)]
        return ends[-1] if ends else len(text)

    @property
    def end_of_turn(self) -> int:
        """The token that ends an assistant's turn: the first special one the template puts behind its content.

        Raises: UserError for a template that ends turns without one.
        """
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        pieces = self.spell(example)
        place = max(index for index, piece in enumerate(pieces) if piece.is_content)
        behind = "".join(piece.text for piece in pieces[place + 1 :])
        for part in self._split_special(behind):
            if part in self._special_ids:
                return self._special_ids[part]
        raise UserError(
            "the chat template ends an assistant's turn without a special token, so nothing would tell "
            "generation to stop; put one behind the content."
        )


def chat_template(setting: str | None, folder: Path | None, tokenizer: TextTokenizer) -> ChatTemplate:
    """Return the template that is set (itself or its file), or the tokenizer's own beside it, or one that fits its
    tokens.

    Raises: UserError for a file that is not there.
    """
    if setting is not None and "{{" in setting:
        return ChatTemplate(setting, tokenizer)
    if setting is not None:
        try:
            return ChatTemplate(Path(setting).expanduser().read_text(encoding="utf-8"), tokenizer)
        except OSError as error:
            raise UserError(f"sft.chat_template={setting}: {error}. Give a Jinja file.") from None
    own = _own_template(folder) if folder is not None else None
    if own is not None:
        return ChatTemplate(own, tokenizer)
    has_chatml = tokenizer.id_of("<|im_start|>") is not None
    return ChatTemplate(CHATML if has_chatml else PLAIN, tokenizer)


def _own_template(path: Path) -> str | None:
    """Return the template that lies beside a tokenizer.json, in a file of its own or in its configuration."""
    folder = tokenizer_file(path).parent
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return None
    found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((t["template"] for t in found if t["name"] == "default"), None)
    return found


def _mark(message: dict[str, Any], contents: list[str]) -> dict[str, Any]:
    """Replace a message's content by a mark of its own; the content is noted."""
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return message
    assert len(contents) < _NUM_MARKS, "a conversation of 65,533 messages"
    contents.append(content)
    return {**message, "content": chr(_FIRST_MARK + len(contents) - 1)}


def _pieces(text: str, contents: list[str]) -> list[Piece]:
    pieces, markup = [], ""
    for character in text:
        index = ord(character) - _FIRST_MARK
        if not 0 <= index < len(contents):
            markup += character
            continue
        pieces += [Piece(markup, False)] if markup else []
        pieces.append(Piece(contents[index], True))
        markup = ""
    return pieces + ([Piece(markup, False)] if markup else [])
