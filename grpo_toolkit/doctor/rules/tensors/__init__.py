"""Rules about the stored tensors: names, shapes, dtypes, ties, shards, experts, scales."""
