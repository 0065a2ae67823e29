"""Keep teachers' aligned caches on disk: written once, read instead of running the teachers."""
