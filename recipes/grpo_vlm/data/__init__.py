"""Rows, images and prompts of a data set."""
