"""One file per fused operation: its plain-torch reference, and the dispatcher that picks a backend and says why."""
