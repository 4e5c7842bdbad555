"""Tokenization of documents, without torch: the worker processes of `prepare` import this file."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.data.held_out import hash_fraction
from megatron_q3n.data.manifest import token_dtype
from megatron_q3n.data.readers import RawDocument, text_of
from megatron_q3n.data.tokenizer import TextTokenizer

# locations of empty documents that a batch names
MAX_NAMED = 5


@dataclass(frozen=True)
class EncodedDocuments:
    """Concatenated token ids of several documents, each with its end-of-document token.

    Shapes: ids (sum of lengths,) uint16 or int32; lengths (num_documents,) int64, end-of-document token included.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    num_skipped_empty: int


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of raw documents: those for training, the held-out ones, and what is left out.

    `bad_lines` are the messages of documents that cannot be read; `empty` the locations of the first empty documents.
    """

    train: EncodedDocuments
    held_out: EncodedDocuments
    bad_lines: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def encode_documents(tokenizer: TextTokenizer, texts: Sequence[str]) -> EncodedDocuments:
    """Tokenize documents in order; documents of white space only are counted and skipped."""
    kept = [text for text in texts if not is_empty(text)]
    dtype = token_dtype(tokenizer.vocab_size)
    parts = [np.array([*ids, tokenizer.eod], dtype=dtype) for ids in tokenizer.encode_batch(kept)]
    return EncodedDocuments(
        ids=np.concatenate(parts) if parts else np.empty(0, dtype=dtype),
        lengths=np.array([len(part) for part in parts], dtype=np.int64),
        text_bytes=sum(len(text.encode("utf-8")) for text in kept),
        num_skipped_empty=len(texts) - len(kept),
    )


def encode_batch(
    tokenizer: TextTokenizer, batch: Sequence[RawDocument], column: str, held_out_share: float
) -> EncodedBatch:
    """Parse and tokenize raw documents; those whose text's hash is below the share are held out."""
    train: list[str] = []
    held_out: list[str] = []
    bad_lines: list[str] = []
    empty: list[str] = []
    for document in batch:
        try:
            text = text_of(document, column)
        except UserError as error:
            bad_lines.append(str(error))
            continue
        if is_empty(text) and len(empty) < MAX_NAMED:
            empty.append(f"{document.path}:{document.number}")
        is_held_out = held_out_share > 0 and not is_empty(text) and hash_fraction(text) < held_out_share
        (held_out if is_held_out else train).append(text)
    return EncodedBatch(encode_documents(tokenizer, train), encode_documents(tokenizer, held_out), bad_lines, empty)


def is_empty(text: str) -> bool:
    """Return whether a text is empty or white space only."""
    return not text or text.isspace()
