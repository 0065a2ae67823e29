"""What a model's ``path`` stands for: a folder or hub name, a GGUF file, or an adapter on a base model."""
