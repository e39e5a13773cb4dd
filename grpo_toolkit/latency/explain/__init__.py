"""The causes of a difference in latency: evidence without a clock, an exact split, toggles."""
