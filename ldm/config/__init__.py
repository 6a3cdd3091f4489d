"""From YAML text and overrides to checked values, and from these to objects."""
