"""Spec files: the pipeline in YAML, validated against what is installed. No torch here."""
