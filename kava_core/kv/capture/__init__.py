"""Read keys, values and queries out of a Hugging Face model, and undo their rotation."""
