"""Chat templates (Jinja): selection, rendering of conversations, and tokenization that separates contents from markup.

Message contents never become control tokens (no special-token injection): each content is replaced by a private-use
character while the template renders, and substituted afterwards, marked as content. A user's text "<|im_end|>" is
tokenized as ordinary text, and the tokenizer's special tokens come from the template alone.

The loss of an assistant's turn covers the text that the template adds after the generation prompt, up to and including
the token that ends the turn. The generation prompt is tokenized separately from it, so that training and generation
split the tokens at the same position.
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
# for tokenizers whose only special token is the end-of-document token, such as those of `train_bpe`
PLAIN = """\
{%- for message in messages %}
{{- message.role + ':\\n' + message.content + eod_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:\\n' }}{%- endif %}"""
# Unicode's private-use plane 15: no template contains these characters
_FIRST_PLACEHOLDER, _NUM_PLACEHOLDERS = 0xF0000, 0xFFFD


@dataclass(frozen=True)
class TextSegment:
    """Part of a rendered conversation: a message's content (always ordinary text), or the template's markup."""

    text: str
    is_content: bool


class ChatTemplate:
    """A Jinja chat template and the tokenizer of its special tokens."""

    def __init__(self, source: str, tokenizer: TextTokenizer) -> None:
        self.source, self._tokenizer = source, tokenizer
        self._special_ids = tokenizer.special_ids
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def render(
        self, messages: list[dict[str, Any]], *, generation_prompt: bool = False, **extras: Any
    ) -> list[TextSegment]:
        """Return the rendered conversation as segments, with `generation_prompt` including the assistant's prefix.

        Raises: UserError if the template refuses the messages, or if it transforms contents that hold special tokens.
        """
        contents: list[str] = []
        placeholders = [_with_placeholder(message, contents) for message in messages]
        extras["add_generation_prompt"] = generation_prompt
        segments = _split_at_placeholders(self._render_text(placeholders, extras), contents)
        plain = self._render_text(messages, extras)
        if "".join(segment.text for segment in segments) == plain:
            return segments
        # a template that transforms contents (strips them, or searches them) cannot be rendered with placeholders
        special = self._specials.search("\0".join(contents)) if self._special_ids else None
        if special:
            raise UserError(
                f"a message contains the special token {special[0]!r}, and this chat template transforms contents, so "
                "that content and markup cannot be told apart; remove the token from the message."
            )
        return [TextSegment(plain, False)]

    @property
    def named_tokens(self) -> dict[str, str]:
        """Special tokens by the names that templates use."""
        return {"eod_token": self._tokenizer.eod_token, "eos_token": self._tokenizer.eod_token, "bos_token": ""}

    def _render_text(self, messages: list[dict[str, Any]], extras: dict[str, Any]) -> str:
        try:
            (text,), _ = render_jinja_template([messages], chat_template=self.source, **self.named_tokens, **extras)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template refuses a conversation: {error}") from None
        return text

    def encode(self, segments: list[TextSegment]) -> list[int]:
        """Return token ids: special tokens where the template's markup has them, ordinary ones everywhere else."""
        ids: list[int] = []
        ordinary = ""
        for segment in segments:
            parts = [segment.text] if segment.is_content else self._split_special(segment.text)
            for part in parts:
                special = None if segment.is_content else self._special_ids.get(part)
                if special is None:
                    ordinary += part
                    continue
                ids += [*self._tokenizer.encode(ordinary), special]
                ordinary = ""
        return ids + self._tokenizer.encode(ordinary)

    def prompt(self, messages: list[dict[str, Any]], **extras: Any) -> list[int]:
        """Return the token ids of a generation prompt: the conversation and the assistant's prefix."""
        return self.encode(self.render(messages, generation_prompt=True, **extras))

    def _split_special(self, text: str) -> list[str]:
        """Split markup at the tokenizer's special tokens, which become parts of their own."""
        return [part for part in self._specials.split(text) if part]

    def end_of_last_special(self, text: str) -> int:
        """Return the offset after the last special token of a text; the text's length if there is none."""
        ends = [match.end() for match in self._specials.finditer(text)]
        return ends[-1] if ends else len(text)

    @property
    def end_of_turn(self) -> int:
        """The end-of-turn token: the first special token of the template after an assistant's content.

        Raises: UserError for a template that ends turns without a special token.
        """
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        segments = self.render(example)
        last_content = max(index for index, segment in enumerate(segments) if segment.is_content)
        suffix = "".join(segment.text for segment in segments[last_content + 1 :])
        for part in self._split_special(suffix):
            if part in self._special_ids:
                return self._special_ids[part]
        raise UserError(
            "the chat template ends an assistant's turn without a special token, so generation would not stop; put a "
            "special token after the content in the template (sft.chat_template)."
        )


def chat_template(setting: str | None, folder: Path | None, tokenizer: TextTokenizer) -> ChatTemplate:
    """Return the chat template: `setting` (text or file), else the tokenizer's in `folder`, else ChatML or plain text.

    Raises: UserError for a file that cannot be read.
    """
    if setting is not None and "{{" in setting:
        return ChatTemplate(setting, tokenizer)
    if setting is not None:
        try:
            return ChatTemplate(Path(setting).expanduser().read_text(encoding="utf-8"), tokenizer)
        except OSError as error:
            raise UserError(f"sft.chat_template={setting}: {error}. Give a Jinja file.") from None
    source = _tokenizer_template(folder) if folder is not None else None
    if source is not None:
        return ChatTemplate(source, tokenizer)
    has_chatml = tokenizer.id_of("<|im_start|>") is not None
    return ChatTemplate(CHATML if has_chatml else PLAIN, tokenizer)


def saved_template(folder: Path, tokenizer: TextTokenizer) -> ChatTemplate | None:
    """Return the chat template in a tokenizer's folder, or None."""
    source = _tokenizer_template(folder)
    return None if source is None else ChatTemplate(source, tokenizer)


def _tokenizer_template(path: Path) -> str | None:
    """Return the template next to a tokenizer.json: chat_template.jinja, or a field of tokenizer_config.json."""
    folder = tokenizer_file(path).parent
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return None
    template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    # a list of named templates
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _with_placeholder(message: dict[str, Any], contents: list[str]) -> dict[str, Any]:
    """Return the message with its content replaced by a placeholder, and append the content to `contents`."""
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return message
    assert len(contents) < _NUM_PLACEHOLDERS, "a conversation of 65,533 messages"
    contents.append(content)
    return {**message, "content": chr(_FIRST_PLACEHOLDER + len(contents) - 1)}


def _split_at_placeholders(text: str, contents: list[str]) -> list[TextSegment]:
    segments, markup = [], ""
    for character in text:
        index = ord(character) - _FIRST_PLACEHOLDER
        if not 0 <= index < len(contents):
            markup += character
            continue
        segments += [TextSegment(markup, False)] if markup else []
        segments.append(TextSegment(contents[index], True))
        markup = ""
    return segments + ([TextSegment(markup, False)] if markup else [])
