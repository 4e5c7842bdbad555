"""Evaluation of a trained model: held-out loss, draft acceptance, recall, lm-evaluation-harness tasks."""
