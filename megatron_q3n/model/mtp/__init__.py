"""Multi-token prediction (MTP): losses, drafts unrolled over depths, acceptance statistics."""
