"""Tokenizer files of an export: other programs tokenize, render conversations and stop as the trained model expects.

tokenizer_config.json names a class that reads tokenizer.json as it is: the class that transformers would choose for the
model type rebuilds the tokenizer with a pre-tokenizer of its own. After fine-tuning, eos_token is the token that ends a
turn in the chat template, and the template uses the standard variables with the meaning they had in training.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_q3n.config import UserError
from megatron_q3n.conversion.importing import SIDE_FILES
from megatron_q3n.conversion.run_tokenizer import TokenizerSource
from megatron_q3n.data.chat_template import TEMPLATE_FILE, ChatTemplate, chat_template
from megatron_q3n.data.tokenizer import TOKENIZER_FILE, TextTokenizer, fingerprint_of
from megatron_q3n.hf.weights import read_json

# reads tokenizer.json without rebuilding any part of it
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
# of released multimodal models
PROCESSOR_TEMPLATE = "chat_template.json"
# its entries become part of tokenizer_config.json
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
# fields that select or alter a class, add tokens that training did not see, or are not transformers' own
_DROPPED = {
    *("auto_map", "add_bos_token", "add_eos_token", "tokenizer_file", "special_tokens_map_file", "name_or_path"),
    "eod_token",
}
# fields of config.json that a tokenizer determines
TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class PublishedTokenizer:
    """Contents of the tokenizer files by name, and what config.json says of the tokenizer.

    is_chat_format: the model was fine-tuned on conversations in the chat template.
    """

    files: dict[str, bytes]
    token_ids: dict[str, int | None]
    vocab_size: int
    fingerprint: str
    is_chat_format: bool

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def published_tokenizer(source: TokenizerSource, companions: Iterable[Path], max_tokens: int) -> PublishedTokenizer:
    """Return the files to publish for a tokenizer.

    companions: folders whose other files (generation_config.json, vocab.json, …) are used where they have the same
    tokenizer. max_tokens: the context length, for a tokenizer whose files do not tell it.
    Raises: UserError if the tokenizer cannot be read, or one of its files is damaged.
    """
    tokenizer = TextTokenizer.load(source.path, source.eod_token)
    folders = _folders_of(tokenizer, source.path, companions)
    files = {name: path.read_bytes() for name in SIDE_FILES if (path := _first(folders, name)) is not None}
    settings = _published_settings(folders)
    template = None
    if source.is_chat_format:
        template = chat_template(None, source.path, tokenizer)
        settings["eos_token"] = _name_of(template.end_of_turn, tokenizer)
        settings.pop("chat_template", None)
        files.pop(PROCESSOR_TEMPLATE, None)
    settings.setdefault("eos_token", tokenizer.eod_token)
    settings.setdefault("pad_token", tokenizer.eod_token)
    settings.setdefault("model_max_length", max_tokens)
    settings |= {"tokenizer_class": TOKENIZER_CLASS, "clean_up_tokenization_spaces": False}
    token_ids = {name: _id_of(settings.get(name.removesuffix("_id")), tokenizer) for name in TOKEN_ID_FIELDS}
    if template is not None:
        files[TEMPLATE_FILE] = _with_standard_variables(template, settings).encode()
    files[TOKENIZER_FILE] = _without_added_tokens(tokenizer).encode()
    files[TOKENIZER_CONFIG] = _json(settings)
    released = _first(folders, GENERATION_CONFIG)
    generation = read_json(released) if released else {}
    files[GENERATION_CONFIG] = _json(_generation(generation, token_ids, tokenizer.eod, template is not None))
    files.pop(SPECIAL_TOKENS_MAP, None)
    # transformers would not train the padding token's embedding, here a token of the text
    token_ids["pad_token_id"] = None
    return PublishedTokenizer(files, token_ids, tokenizer.vocab_size, tokenizer.fingerprint, template is not None)


def has_tokenizer(folder: Path, fingerprint: str) -> bool:
    """Return whether a folder has the tokenizer with this fingerprint."""
    return (folder / TOKENIZER_FILE).is_file() and fingerprint_of(folder) == fingerprint


def _folders_of(tokenizer: TextTokenizer, path: Path, companions: Iterable[Path]) -> list[Path]:
    """Return the tokenizer's folder and the companions, as far as their tokenizer.json is this tokenizer."""
    folders = [path if path.is_dir() else path.parent, *companions]
    return [folder for folder in folders if has_tokenizer(folder, tokenizer.fingerprint)]


def _first(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _published_settings(folders: list[Path]) -> dict[str, Any]:
    """Return the entries of special_tokens_map.json and tokenizer_config.json, those of the first folder preferred."""
    settings: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        for folder in reversed(folders):
            settings |= read_json(folder / name) if (folder / name).is_file() else {}
    return {name: value for name, value in settings.items() if name not in _DROPPED and value not in (None, "")}


def _name_of(token: int, tokenizer: TextTokenizer) -> str:
    return next(name for name, index in tokenizer.special_ids.items() if index == token)


def _id_of(token: Any, tokenizer: TextTokenizer) -> int | None:
    """Return the id of an entry of tokenizer_config.json: a name, a dictionary with its content, or None."""
    name = token.get("content") if isinstance(token, dict) else token
    if name is None:
        return None
    index = tokenizer.id_of(name) if isinstance(name, str) else None
    if index is None:
        raise UserError(
            f"{TOKENIZER_CONFIG} names the special token {name!r}, which {TOKENIZER_FILE} does not have. The two files "
            "are not of one tokenizer; give --tokenizer with a folder where they are."
        )
    return index


def _with_standard_variables(template: ChatTemplate, settings: dict[str, Any]) -> str:
    """Return the template, preceded by definitions of the variables that mean something else in the export."""
    exported = {name: _text(settings.get(name)) for name in ("eos_token", "pad_token", "bos_token")}
    definitions = ""
    for name, value in template.named_tokens.items():
        if exported.get(name) != value and re.search(rf"\b{name}\b", template.source):
            is_eos = name not in exported and exported["eos_token"] == value
            definitions += f"{{% set {name} = {'eos_token' if is_eos else json.dumps(value)} %}}\n"
    return definitions + template.source


def _text(token: Any) -> str:
    """Return the text that a template prints for an entry of tokenizer_config.json."""
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _without_added_tokens(tokenizer: TextTokenizer) -> str:
    """Return tokenizer.json without a post-processor that adds special tokens: training adds none."""
    content = json.loads(tokenizer.content)
    backend = Tokenizer.from_str(tokenizer.content)
    if backend.num_special_tokens_to_add(is_pair=False):
        content["post_processor"] = None
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _generation(
    published: dict[str, Any], token_ids: dict[str, int | None], eod: int, is_chat_format: bool
) -> dict[str, Any]:
    """Return generation_config.json: generation stops at the end of a turn and at the end of a document."""
    own = published.get("eos_token_id")
    if own is not None and not is_chat_format:
        return published
    stops = [token_ids["eos_token_id"], *(own if isinstance(own, list) else [own]), eod]
    unique = list(dict.fromkeys(token for token in stops if token is not None))
    defaults = {name: token_ids[name] for name in ("bos_token_id", "pad_token_id") if token_ids[name] is not None}
    return {**defaults, **published, "eos_token_id": unique if len(unique) > 1 else unique[0]}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
