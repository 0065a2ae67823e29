"""Run experiments that can be believed, and judge what a difference between two variants is worth."""
