"""Read spec files: a whole pipeline in YAML, validated against what is installed. No torch here."""
