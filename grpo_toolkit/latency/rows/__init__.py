"""The rows of `latency.jsonl`: their schema, their file, and a review of it."""
