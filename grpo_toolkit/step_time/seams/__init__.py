"""The seams of a training that a clock is told at, and what is noted there."""
