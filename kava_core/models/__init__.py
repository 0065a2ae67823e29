"""Load, shrink, shard, place and run the language models of transformers."""
