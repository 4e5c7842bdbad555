"""From a model and batches to optimizer steps: state, decay groups, losses, one step, the loop."""
