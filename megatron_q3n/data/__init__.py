"""Data pipeline: tokenizer, prepared folders, blends, sequence packing, SFT conversations, and the bigram baseline.

    files -> sources -> encoding (worker processes) -> writer -> prepared folder (manifest)
    prepared folders -> sample_datasets (megatron-core's GPTDataset) -> pretrain -> Batch
    conversations -> chat_template -> sft_packing (best-fit decreasing, Packing) -> sft -> Batch

The package contains no model and no loss, and reads no process group: ranks are passed as arguments. It imports
nothing, so that preparing data does not load torch before its input was checked.
"""
