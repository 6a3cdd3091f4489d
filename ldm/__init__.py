"""Latent diffusion: both stages, text conditioning, sampling, evaluation and interchange."""

__version__ = "0.1.0"
