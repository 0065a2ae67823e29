"""The tensor half: caches, timelines, capture, alignment stages, the pipeline."""
