"""Examples, their text, and the token batches of a student and its teachers."""
