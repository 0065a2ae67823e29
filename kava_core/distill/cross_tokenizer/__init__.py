"""Distil next-token distributions of teachers with other tokenizers than the student's."""
