"""Conversion of checkpoints from and to Hugging Face folders, file to file, without building a model.

    importing.py            Hugging Face folder -> checkpoint
    exporting.py            checkpoint -> Hugging Face folder
    run_tokenizer.py        the tokenizer that a checkpoint's run trained with
    published_tokenizer.py  its files in an export
    tensor_chunks.py        the chunk of a checkpoint tensor that holds each Hugging Face tensor, one expert at a time
    torch_dist.py           megatron-core's file format (torch.distributed.checkpoint)
    resumable_output.py     output folder that is complete or absent, and resumes after an interruption
    malloc.py               glibc setting that returns freed memory to the operating system

Memory is bounded by the largest Hugging Face tensor. No megatron-core and no process group: a conversion runs on any
machine with enough disk space.
"""
