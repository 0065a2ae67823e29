"""Count what a step takes, before it runs (``kava plan``) and after (``run.json``)."""
