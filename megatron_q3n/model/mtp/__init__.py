"""Multi-token prediction (MTP): losses, draft chains over depths, acceptance statistics."""
