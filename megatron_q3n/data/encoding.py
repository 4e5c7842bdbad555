"""Tokenization of documents, without torch: the worker processes of `prepare` import this file."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_q3n.data.manifest import token_dtype
from megatron_q3n.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EncodedDocuments:
    """Concatenated token ids of several documents, each with its end-of-document token.

    Shapes: ids (sum of lengths,) uint16 or int32; lengths (num_documents,) int64, end-of-document token included.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    num_skipped_empty: int


def encode_documents(tokenizer: TextTokenizer, texts: Sequence[str]) -> EncodedDocuments:
    """Tokenize documents in order; documents of white space only are counted and skipped."""
    kept = [text for text in texts if text and not text.isspace()]
    dtype = token_dtype(tokenizer.vocab_size)
    parts = [np.array([*ids, tokenizer.eod], dtype=dtype) for ids in tokenizer.encode_batch(kept)]
    return EncodedDocuments(
        ids=np.concatenate(parts) if parts else np.empty(0, dtype=dtype),
        lengths=np.array([len(part) for part in parts], dtype=np.int64),
        text_bytes=sum(len(text.encode("utf-8")) for text in kept),
        num_skipped_empty=len(texts) - len(kept),
    )
