"""Known before the first step: memory, batches, versions."""
