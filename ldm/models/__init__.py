"""The networks: plain torch modules that know nothing of paths, losses or training."""
