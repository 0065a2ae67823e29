"""Find what a model's ``path`` stands for: folder or hub name, a GGUF file, or an adapter on a base model."""
