"""Text in, batches out: tokenizer, prepared folders, blends of them, packing, and the bigram yardstick.

    files -> sources -> encoding (worker processes) -> writer -> prepared folder (manifest)
    prepared folders -> rows (megatron-core's GPTDataset) -> pretrain -> Batch

No model and no loss lives here, and nothing asks which rank it runs on: ranks arrive as arguments.
Imports stay in the files, so that preparing data does not load torch before its input was checked.
"""
