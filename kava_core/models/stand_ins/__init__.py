"""Put controls that know nothing in a teacher's place: weights without training, tokens without a model."""
