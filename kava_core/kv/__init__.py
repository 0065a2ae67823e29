"""Capture, align and compare key–value caches: the part of kava that works on tensors."""
