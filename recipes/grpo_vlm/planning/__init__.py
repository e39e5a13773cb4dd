"""The facts that are known before the first step: memory, batches, versions."""
