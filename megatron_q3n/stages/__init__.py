"""What a run does, from configuration to report: the only room that composes the others."""
