"""The command line: one verb, one thin function. Heavy imports stand inside the functions."""
