"""Checkpoints: our one-file format, and what others call the same tensors."""
