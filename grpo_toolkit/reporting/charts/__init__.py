"""Charts of latency rows."""
