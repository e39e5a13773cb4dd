"""The attention of a live model."""
