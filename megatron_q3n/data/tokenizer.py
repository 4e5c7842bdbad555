"""Byte-level BPE tokenizers: loading, training, and the number of UTF-8 bytes of each token.

Only byte-level tokenizers are supported (GPT-2, Llama 3, Qwen, and those of `train_bpe`): they encode every text, and
every token has a known number of UTF-8 bytes, so that losses of different vocabularies compare in bits per byte.

Text never becomes a control token: the characters "<|endoftext|>" in a document are encoded as ordinary tokens, so that
the end-of-document token appears only where this code adds it.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_q3n.config import UserError, suggest

TOKENIZER_FILE, TOKENIZER_SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
END_OF_DOCUMENT = "<|endoftext|>"

# Names of the end-of-document token in published tokenizers, in order of preference. They take precedence over
# eos_token, which in Qwen's chat models is <|im_end|>, the end of a turn.
_KNOWN_END_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>")

# A line break is joined with the blank lines before it and the indentation after it, so that in Python source one token
# can be a new line with its indentation. Then, as in GPT-2, words, numbers and punctuation, each with at most one
# leading space, and other white space. The pattern covers every text.
_SPLIT = r"\s*\n[ \t]*| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+"


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of the byte-level alphabet stands for.

    Printable characters of Latin-1 stand for their own byte, and those from U+0100 for the other bytes in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class TextTokenizer:
    """A byte-level tokenizer with an end-of-document token.

    The properties `eod`, `pad`, `unique_identifiers` and `special_tokens_dict` are the tokenizer interface of
    megatron-core's datasets.
    """

    def __init__(self, content: dict[str, Any], eod_token: str) -> None:
        self._canonical = _canonical(content)
        self._backend = Tokenizer.from_str(self._canonical)
        self._backend.encode_special_tokens = True
        self.eod_token = eod_token
        eod = self._backend.token_to_id(eod_token)
        assert eod is not None, f"{eod_token} is among the added tokens and yet has no id"
        self.eod: int = eod

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the content: the library's own pickle loses `encode_special_tokens`."""
        return TextTokenizer, (json.loads(self._canonical), self.eod_token)

    @classmethod
    def load(cls, path: str | Path, eod_token: str | None = None) -> "TextTokenizer":
        """Load a tokenizer.json, or the one in a folder.

        `eod_token` is the name of the end-of-document token; None searches the known names.

        Raises: UserError if it is missing, damaged, not byte-level, or has no end-of-document token.
        """
        file = tokenizer_file(path)
        content = _read_tokenizer(file)
        eod_token = _find_eod_token(file, content, eod_token)
        try:
            return cls(content, eod_token)
        # the library raises bare Exception for every invalid file
        except Exception as error:
            raise UserError(
                f"tokenizer {file}: the tokenizers library refuses it ({error}). Give a file that "
                "this version of the library can read."
            ) from None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, no special tokens added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; runs on all cores unless TOKENIZERS_PARALLELISM=false."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; special tokens appear by name, invalid UTF-8 as U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token; special tokens have those of their name, unknown ids none."""
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if _BYTE_OF_CHARACTER.keys() >= set(name):
            return bytes(_BYTE_OF_CHARACTER[character] for character in name)
        return name.encode("utf-8")

    def id_of(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary or of the special tokens; None if there is none."""
        return self._backend.token_to_id(token)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Id of every special token, by name."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @property
    def content(self) -> str:
        """The canonical JSON of tokenizer.json."""
        return self._canonical

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into a folder."""
        (folder / TOKENIZER_FILE).write_text(self._canonical, encoding="utf-8")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad(self) -> int:
        """The end-of-document id: pretraining samples are full, so nothing is padded."""
        return self.eod

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON of tokenizer.json: independent of the file's formatting."""
        return hashlib.sha256(self._canonical.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def unique_identifiers(self) -> "OrderedDict[str, Any]":
        """Values that megatron-core hashes into the names of its cached index files."""
        return OrderedDict(fingerprint=self.fingerprint, eod=self.eod)

    @property
    def special_tokens_dict(self) -> dict[str, int]:
        """Ids of special tokens by role; megatron-core compares `pad` with them."""
        return {"eod_token": self.eod}

    def token_num_bytes(self) -> np.ndarray:
        """Return, for each id, the UTF-8 bytes it decodes to; special tokens count 0.

        Shapes: (vocab_size,) int64.
        """
        special = {t.content for t in self._backend.get_added_tokens_decoder().values() if t.special}
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        num_bytes_V = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if token not in special:
                # one character of the byte alphabet stands for one byte
                is_byte_level = alphabet.issuperset(token)
                num_bytes_V[index] = len(token) if is_byte_level else len(token.encode("utf-8"))
        return num_bytes_V


def train_bpe(texts: Iterable[str], vocab_size: int, *, single_digits: bool = False) -> TextTokenizer:
    """Train a byte-level BPE with one special token, <|endoftext|> (id 0); deterministic in the texts.

    `single_digits` makes each digit a separate token, as in Qwen's tokenizer. The vocabulary is smaller than
    `vocab_size` when the texts hold too few repeated pairs.

    Raises: UserError for a vocab_size below the 256 bytes and the special token.
    Reference: Sennrich et al. 2016, arXiv 1508.07909; byte level: Radford et al. 2019 (GPT-2).
    """
    if vocab_size < 257:
        raise UserError(
            f"a BPE vocabulary of {vocab_size} cannot hold the 256 bytes and {END_OF_DOCUMENT}; use 257 or more."
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    backend = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, *digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return TextTokenizer(json.loads(backend.to_str()), END_OF_DOCUMENT)


def tokenizer_file(path: str | Path) -> Path:
    """Return the tokenizer.json of a path: the file itself, or the one in that folder.

    Raises: UserError if there is none.
    """
    path = Path(path).expanduser()
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"tokenizer {path}: {file} does not exist. Give a {TOKENIZER_FILE} (Hugging Face tokenizers "
            "format) or a folder that holds one, or train one with tools/prepare_data.py --train-tokenizer."
        )
    return file


def fingerprint_of(path: str | Path) -> str:
    """Return the fingerprint of a tokenizer.json without building the tokenizer."""
    canonical = _canonical(_read_tokenizer(tokenizer_file(path)))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(content: dict[str, Any]) -> str:
    """Return canonical JSON of the content, without truncation and padding, which would cut documents."""
    cleaned = content | {"truncation": None, "padding": None}
    return json.dumps(cleaned, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    # RecursionError: nested too deeply
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}). Download or create the file again.") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: holds a {type(content).__name__}, not a JSON object. Download or create the file again."
        )
    return content


def _read_tokenizer(file: Path) -> dict[str, Any]:
    content = _read_object(file)
    decoder = content.get("decoder")
    if "ByteLevel" not in _decoder_types(decoder):
        kind = decoder.get("type") if isinstance(decoder, dict) else "no object"
        raise UserError(
            f"tokenizer {file}: its decoder is {kind}, not ByteLevel. Only byte-level "
            "tokenizers (GPT-2, Llama 3, Qwen, --train-tokenizer) are supported: they encode every text."
        )
    added = content.get("added_tokens", [])
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in added
    ):
        raise UserError(f"tokenizer {file}: added_tokens is not a list of tokens. Download or create the file again.")
    return content


def _decoder_types(decoder: Any) -> set[Any]:
    """Return the types of a decoder and of its parts, if it is a sequence; of a damaged one nothing."""
    if not isinstance(decoder, dict):
        return set()
    parts = decoder.get("decoders", [])
    parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return {kind for part in [decoder, *parts] if isinstance(kind := part.get("type"), str)}


def _find_eod_token(file: Path, content: dict[str, Any], requested: str | None) -> str:
    """Return the name of the end-of-document token: the requested one, a known one, or the folder's eos_token."""
    added = {token["content"] for token in content.get("added_tokens", [])}
    settings = tokenizer_settings(file.parent)
    # eod_token is written by this project's runs
    configured = [_token_name(settings.get(name)) for name in ("eod_token", "eos_token")]
    for name in [requested] if requested else [configured[0], *_KNOWN_END_OF_DOCUMENT, configured[1]]:
        if name in added:
            return str(name)
    problem = f"has no token {requested!r}" if requested else "no known end-of-document token"
    hint = suggest(requested, added) if requested else ""
    listed = ", ".join(sorted(added)[:20]) or "none"
    raise UserError(
        f"tokenizer {file}: {problem}.{hint} Name the token that ends a document (tools/prepare_data.py "
        f"--eod-token NAME); this tokenizer's added tokens are: {listed}."
    )


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return the tokenizer_config.json of a folder; {} if there is none."""
    file = folder / TOKENIZER_SETTINGS_FILE
    return _read_object(file) if file.is_file() else {}


def _token_name(token: Any) -> str | None:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
