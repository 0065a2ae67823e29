"""Controls in a teacher's place that know nothing: weights without training, tokens without a model."""
