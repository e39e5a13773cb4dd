"""The inputs of a model in training: rows read once, images processed once."""
