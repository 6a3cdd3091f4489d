"""Configurations: YAML text and overrides, checked values, and the objects they describe."""
