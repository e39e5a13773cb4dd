"""Measuring latency: workloads, rounds, statistics, the gate."""
