"""Put models together before they are used: from a GGUF file, with an adapter, or of fewer layers."""
