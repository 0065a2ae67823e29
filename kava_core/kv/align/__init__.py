"""Bring a teacher's cache to the student's layers, heads, time and width."""
