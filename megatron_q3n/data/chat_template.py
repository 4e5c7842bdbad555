"""Chat templates (Jinja): selection, rendering of conversations, and tokenization that separates contents from markup.

What a conversation holds never becomes a control token (no special-token injection), neither contents nor thoughts,
tool calls and descriptions of tools (protected_text.py). A user's text "<|im_end|>" is tokenized as ordinary text, and
the tokenizer's special tokens come from the template alone.

A template gets the special tokens of its tokenizer's folder (`eos_token`, `bos_token`, …: tokenizer_config.json), as in
transformers. `eod_token` is the token that ends a document.

The loss of an assistant's turn covers the text that the template adds after the generation prompt, up to and including
the token that ends the turn. The generation prompt is tokenized separately from it, so that training and generation
split the tokens at the same position.
"""

import re
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_q3n.config import UserError
from megatron_q3n.data.default_templates import CHATML, PLAIN
from megatron_q3n.data.protected_text import ProtectedTexts, TextSegment
from megatron_q3n.data.tokenizer import TextTokenizer, tokenizer_file, tokenizer_settings

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """A Jinja chat template and the tokenizer of its special tokens."""

    def __init__(self, source: str, tokenizer: TextTokenizer, named_tokens: dict[str, str] | None = None) -> None:
        """`named_tokens` are the tokenizer's special tokens by the names that templates use, e.g. eos_token."""
        self.source, self._tokenizer = source, tokenizer
        defaults = {"eod_token": tokenizer.eod_token, "eos_token": tokenizer.eod_token, "bos_token": ""}
        self.named_tokens = defaults | (named_tokens or {}) | {"eod_token": tokenizer.eod_token}
        self._special_ids = tokenizer.special_ids
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def render(
        self, messages: list[dict[str, Any]], *, generation_prompt: bool = False, **extras: Any
    ) -> list[TextSegment]:
        """Return the rendered conversation as segments, with `generation_prompt` including the assistant's prefix.

        Raises: UserError if the template refuses the messages, or if it transforms contents that hold special tokens.
        """
        protected = ProtectedTexts(self._specials if self._special_ids else None)
        placeholders = [protected.replace_in_message(message) for message in messages]
        tools = extras.pop("tools", None)
        extras["add_generation_prompt"] = generation_prompt
        rendered = self._render_text(placeholders, extras | {"tools": protected.replace(tools)})
        plain = self._render_text(messages, extras | {"tools": tools})
        segments = protected.segments(rendered, plain)
        if segments is not None:
            return segments
        # a template that transforms contents (strips them, or searches them) cannot be rendered with placeholders
        special = protected.special()
        if special:
            raise UserError(
                f"a message contains the special token {special!r}, and this chat template transforms contents, so "
                "that content and markup cannot be told apart; remove the token from the message."
            )
        return [TextSegment(plain, False)]

    def ignores(self, messages: list[dict[str, Any]], reduced: list[dict[str, Any]], **extras: Any) -> bool:
        """Return whether the conversation and a reduced form of it render alike, so that the difference is left out.

        `reduced_tools`, if given, replaces `tools` in the reduced form. A template that refuses this form uses more.
        """
        tools = extras.pop("tools", None)
        reduced_tools = extras.pop("reduced_tools", tools)
        try:
            shorter = self._render_text(reduced, extras | {"tools": reduced_tools})
        except UserError:
            return False
        return self._render_text(messages, extras | {"tools": tools}) == shorter

    def _render_text(self, messages: list[dict[str, Any]], extras: dict[str, Any]) -> str:
        names = self.named_tokens
        try:
            (text,), _ = render_jinja_template([messages], chat_template=self.source, **names, **extras)
        except (TemplateError, TypeError, ValueError) as error:
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
    settings = {} if folder is None else tokenizer_settings(tokenizer_file(folder).parent)
    source = _given_template(setting) if setting is not None else None
    if source is None and folder is not None:
        source = _tokenizer_template(tokenizer_file(folder).parent, settings)
    if source is None:
        source = CHATML if tokenizer.id_of("<|im_start|>") is not None else PLAIN
    return ChatTemplate(source, tokenizer, _named_tokens(settings))


def saved_template(folder: Path, tokenizer: TextTokenizer) -> ChatTemplate | None:
    """Return the chat template in a tokenizer's folder, or None."""
    home = tokenizer_file(folder).parent
    settings = tokenizer_settings(home)
    source = _tokenizer_template(home, settings)
    return None if source is None else ChatTemplate(source, tokenizer, _named_tokens(settings))


def _given_template(setting: str) -> str:
    if "{{" in setting:
        return setting
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sft.chat_template={setting}: {error}. Give a Jinja file.") from None


def _tokenizer_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the template of a tokenizer's folder: chat_template.jinja, or a field of tokenizer_config.json."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    template = settings.get("chat_template")
    # a list of named templates
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens of a tokenizer_config.json by name, as transformers passes them to templates."""
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}
