"""Reference implementation of the whole architecture in plain torch."""
