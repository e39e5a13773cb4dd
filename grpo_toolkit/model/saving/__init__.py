"""Saves of a live model: the hooks of model and processor, and the forms that the files are written in."""
