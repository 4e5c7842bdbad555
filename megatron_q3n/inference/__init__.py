"""Generation from the training model."""
