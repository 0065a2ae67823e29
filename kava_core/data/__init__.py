"""Read examples, and make text and token batches of them for a student and its teachers."""
