"""Writer of prepared folders: documents.bin and documents.idx of megatron-core, the tokenizer, the manifest.

The format is that of megatron-core's IndexedDatasetBuilder (a test compares the bytes), written without it: importing
megatron-core takes 5 to 20 seconds. documents.bin holds all tokens; documents.idx a header, the length and byte offset
of every document, and the number of documents before each document's end.
"""

from array import array
from pathlib import Path

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.data.encoding import EncodedDocuments
from megatron_q3n.data.manifest import (
    DOCUMENTS,
    DTYPE_CODES,
    INDEX_HEADER,
    INDEX_MAGIC,
    Manifest,
    Settings,
    SourceRecord,
    TokenizerRecord,
    record_file,
    token_dtype,
)
from megatron_q3n.data.tokenizer import TextTokenizer


class PreparedWriter:
    """Writer of documents into an empty folder, in the order of the `add` calls."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.num_documents = self.num_tokens = self.text_bytes = self.num_skipped_empty = 0
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._lengths = array("i")
        self._tokens = (folder / f"{DOCUMENTS}.bin").open("wb")

    def add(self, documents: EncodedDocuments) -> None:
        """Append documents, each one item and one document of the indexed dataset, as GPTDataset expects."""
        self._tokens.write(documents.ids.astype(self._dtype, copy=False).tobytes())
        self._lengths.extend(documents.lengths.tolist())
        self.num_documents += len(documents.lengths)
        self.num_tokens += len(documents.ids)
        self.text_bytes += documents.text_bytes
        self.num_skipped_empty += documents.num_skipped_empty

    def finish(self, sources: list[SourceRecord], settings: Settings, num_bad_lines: int = 0) -> Manifest:
        """Write index, tokenizer and manifest.

        Raises: UserError when no document was added.
        """
        self._tokens.close()
        if not self.num_documents:
            raise UserError(
                f"the input holds no text: {self.num_skipped_empty} documents in {len(sources)} files, "
                "all empty or white space. Check the paths and the column."
            )
        self._write_index()
        self.tokenizer.save(self.folder)
        manifest = Manifest(
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            text_bytes=self.text_bytes,
            num_skipped_empty=self.num_skipped_empty,
            num_bad_lines=num_bad_lines,
            token_dtype=self._dtype,
            tokenizer=TokenizerRecord(
                fingerprint=self.tokenizer.fingerprint,
                vocab_size=self.tokenizer.vocab_size,
                eod_token=self.tokenizer.eod_token,
                eod=self.tokenizer.eod,
            ),
            documents_bin=record_file(self.folder / f"{DOCUMENTS}.bin"),
            documents_idx=record_file(self.folder / f"{DOCUMENTS}.idx"),
            sources=sources,
            settings=settings,
        )
        manifest.write(self.folder)
        return manifest

    def _write_index(self) -> None:
        lengths = np.array(self._lengths, np.int32)
        num_documents = len(lengths)
        offsets = np.zeros(num_documents, np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:], dtype=np.int64)
        header = INDEX_HEADER.pack(INDEX_MAGIC, 1, DTYPE_CODES[self._dtype], num_documents, num_documents + 1)
        with (self.folder / f"{DOCUMENTS}.idx").open("wb") as file:
            file.write(header)
            file.write(lengths.tobytes())
            file.write((offsets * np.dtype(self._dtype).itemsize).tobytes())
            file.write(np.arange(num_documents + 1, dtype=np.int64).tobytes())
