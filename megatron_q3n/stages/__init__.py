"""Stages: one module per kind of run, from configuration to report; the only part that may import all others."""
