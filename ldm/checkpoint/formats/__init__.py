"""File formats: our own, CompVis single files, diffusers folders."""
