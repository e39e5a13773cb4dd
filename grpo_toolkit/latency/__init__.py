"""The latency lab: workloads, measurement, and the rows that they leave on disk."""
