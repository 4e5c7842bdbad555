"""Evaluation of a trained model: held-out loss, draft acceptance, copy recall, lm-evaluation-harness tasks."""
