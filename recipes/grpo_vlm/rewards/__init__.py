"""Answers found in completions, and what they earn."""
