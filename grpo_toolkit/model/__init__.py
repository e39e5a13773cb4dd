"""A model in memory."""
