"""A training step's time: where it goes, why, and what physics asks for."""
