"""Metrics of pictures and of models."""
