"""From texts to token ids, document by document. Light: worker processes import this and not torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_q3n.data.manifest import token_dtype
from megatron_q3n.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EncodedDocuments:
    """Token ids of several documents laid end to end, each closed by the end-of-document token."""

    ids: np.ndarray  # (sum of lengths,) uint16 or int32
    lengths: np.ndarray  # (num_documents,) int64, end-of-document token included
    text_bytes: int
    num_skipped_empty: int


def encode_documents(tokenizer: TextTokenizer, texts: Sequence[str]) -> EncodedDocuments:
    """Tokenise documents in order; those with nothing but white space are counted and left out."""
    kept = [text for text in texts if text and not text.isspace()]
    dtype = token_dtype(tokenizer.vocab_size)
    parts = [np.array([*ids, tokenizer.eod], dtype=dtype) for ids in tokenizer.encode_batch(kept)]
    return EncodedDocuments(
        ids=np.concatenate(parts) if parts else np.empty(0, dtype=dtype),
        lengths=np.array([len(part) for part in parts], dtype=np.int64),
        text_bytes=sum(len(text.encode("utf-8")) for text in kept),
        num_skipped_empty=len(texts) - len(kept),
    )
