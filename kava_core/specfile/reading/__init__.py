"""Read a spec's text: strict YAML, numbers, places of values, overrides."""
