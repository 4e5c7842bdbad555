"""Writer of prepared folders: megatron-core's indexed dataset, the tokenizer, the manifest.

The only file of the preparation that needs megatron-core (and with it torch, five seconds of imports); `prepare`
imports it after the first batch of the input was read.
"""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_q3n.config import UserError
from megatron_q3n.data.encoding import EncodedDocuments
from megatron_q3n.data.manifest import (
    DOCUMENTS,
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
        self._builder = IndexedDatasetBuilder(str(folder / f"{DOCUMENTS}.bin"), dtype=np.dtype(self._dtype).type)

    def add(self, documents: EncodedDocuments) -> None:
        """Append documents, each one item and one document of the indexed dataset, as GPTDataset expects."""
        for ids in np.split(documents.ids, np.cumsum(documents.lengths)[:-1]):
            if len(ids):
                self._builder.add_document(ids, [len(ids)])
        self.num_documents += len(documents.lengths)
        self.num_tokens += len(documents.ids)
        self.text_bytes += documents.text_bytes
        self.num_skipped_empty += documents.num_skipped_empty

    def finish(self, sources: list[SourceRecord], settings: Settings) -> Manifest:
        """Write index, tokenizer and manifest.

        Raises: UserError when no document was added.
        """
        if not self.num_documents:
            raise UserError(
                f"the input holds no text: {self.num_skipped_empty} documents in {len(sources)} files, "
                "all empty or white space. Check the paths and the column."
            )
        self._builder.finalize(str(self.folder / f"{DOCUMENTS}.idx"))
        self.tokenizer.save(self.folder)
        manifest = Manifest(
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            text_bytes=self.text_bytes,
            num_skipped_empty=self.num_skipped_empty,
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
