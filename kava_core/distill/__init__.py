"""Compute one step: the student's pass, the teachers' passes, and the terms of the loss."""
