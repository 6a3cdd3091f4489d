"""Checkpoint files: our own format, and the names that others gave the same weights."""
