"""Fuse aligned caches and compare the student's with them: the KV terms of the loss."""
