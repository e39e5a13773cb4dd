"""The doctor: it finds the faults of a model folder, names them in plain words, and repairs them."""
