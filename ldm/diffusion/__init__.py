"""The mathematics of diffusion: torch only, no weights, no randomness."""
